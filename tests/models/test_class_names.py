"""The names of ImageNet's classes: all there, in the order that models have, and how they are asked for."""

from collections import Counter

import pytest

from bitlaw.models.class_names import imagenet_names, known_names, label_of

# From here and there in the list, every one known from published samples and model cards.
SPOTS = {
    0: "tench",
    1: "goldfish",
    2: "great white shark",
    22: "bald eagle",
    88: "macaw",
    130: "flamingo",
    151: "Chihuahua",
    207: "golden retriever",
    250: "Siberian husky",
    279: "Arctic fox",
    281: "tabby",
    291: "lion",
    292: "tiger",
    323: "monarch",
    360: "otter",
    387: "lesser panda",
    388: "giant panda",
    417: "balloon",
    437: "beacon",
    497: "church",
    555: "fire engine",
    562: "fountain",
    604: "hourglass",
    656: "minivan",
    717: "pickup",
    755: "radio telescope",
    812: "space shuttle",
    817: "sports car",
    850: "teddy",
    892: "wall clock",
    928: "ice cream",
    933: "cheeseburger",
    945: "bell pepper",
    949: "strawberry",
    963: "pizza",
    973: "coral reef",
    974: "geyser",
    979: "valley",
    980: "volcano",
    992: "agaric",
    999: "toilet tissue",
}


def test_there_are_a_thousand_classes_in_the_usual_order():
    names = imagenet_names()
    assert len(names) == 1000 and all(all(those) and those for those in names)
    assert {label: names[label][0] for label in SPOTS} == SPOTS


def test_only_two_names_mean_two_classes_each():
    firsts = [those[0] for those in imagenet_names()]
    assert sorted({name for name in firsts if firsts.count(name) > 1}) == ["crane", "maillot"]


def test_a_class_is_asked_for_by_any_of_its_names():
    names = known_names(1000)
    assert label_of("golden retriever", names) == label_of("Golden_Retriever ", names) == 207
    assert label_of("white shark", names) == 2
    alone = Counter(name for those in imagenet_names() for name in {name.casefold() for name in those})
    for label, (first, *_) in enumerate(imagenet_names()):
        if alone[first.casefold()] == 1:
            assert label_of(first, names) == label


def test_names_that_are_not_known_or_not_clear():
    with pytest.raises(ValueError, match="unknown class 'golden retreiver'; did you mean golden retriever"):
        label_of("golden retreiver", known_names(1000))
    with pytest.raises(ValueError, match="'crane' is ambiguous: 134 or 517; give the number"):
        label_of("crane", known_names(1000))
    assert known_names(10) is None
    with pytest.raises(ValueError, match="not known; give numbers"):
        label_of("goldfish", None)
