"""The released models of every family: file names, sizes, and the scores that were published for them.

FID and IS are of 50,000 images at the settings of the authors' table (`recipe="paper"`), of ImageNet or of the data set
that the model was trained on; None where none was published. Sizes without a file are architectures that the official
training code makes, and load like the others.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """One size of a family.

    parameters: numbers in the network, its tables included, without the autoencoder
    num_linears, num_convolutions: layers that may be quantized
    """

    family: str
    size: str
    files: tuple[str, ...]
    parameters: int
    num_linears: int
    num_convolutions: int
    image_size: int
    fid: float | None = None
    inception_score: float | None = None


def _var(depth: int, parameters: int, fid: float, inception_score: float, side: int = 256) -> Release:
    shared = depth == 36
    linears = depth * (4 if shared else 5) + 3 + shared
    return Release("var", f"d{depth}", (f"var_d{depth}.pth",), parameters, linears, 0, side, fid, inception_score)


def _llamagen(
    size: str, depth: int, parameters: int, scores: dict[int, tuple[float | None, float | None]]
) -> tuple[Release, ...]:
    return tuple(
        Release("llamagen", size, (f"c2i_{size}_{side}.pt",), parameters, 5 * depth + 1, 0, side, *score)
        for side, score in scores.items()
    )


def _dit(size: str, depth: int, parameters: int) -> Release:
    return Release("dit", size, (), parameters, 5 * depth + 4, 1, 256)


def _ddpm(
    data: str, hub: str, original: str = "", fid: float | None = None, inception_score: float | None = None
) -> Release:
    files = (hub, original) if original else (hub,)
    sizes = (35_746_307, 48, 65, 32) if data == "CIFAR-10" else (113_673_219, 58, 96, 256)
    return Release("ddpm", data, files, *sizes, fid, inception_score)


_LDM = (274_056_163, 88, 67)

RELEASES: tuple[Release, ...] = (
    # VAR (Tian et al. 2024), scores of the final paper
    _var(16, 310_283_520, 3.30, 274.4),
    _var(20, 600_917_136, 2.57, 302.6),
    _var(24, 1_033_399_360, 2.09, 312.9),
    _var(30, 2_010_020_356, 1.92, 323.1),
    _var(36, 2_353_893_904, 2.63, 303.2, side=512),
    # LlamaGen (Sun et al. 2024); 384-px images are scored at 256
    *_llamagen("B", 12, 110_888_448, {256: (5.46, 193.6), 384: (6.09, 182.5)}),
    *_llamagen("L", 24, 342_910_976, {256: (3.80, 248.3), 384: (3.07, 256.1)}),
    *_llamagen("XL", 36, 774_699_520, {384: (2.62, 244.1)}),
    *_llamagen("XXL", 48, 1_410_972_672, {384: (2.34, 253.9)}),
    *_llamagen("3B", 24, 3_096_659_200, {384: (2.18, 263.3)}),
    Release("llamagen", "XL text, stage 1", ("t2i_XL_stage1_256.pt",), 777_923_840, 183, 0, 256),
    Release("llamagen", "XL text, stage 2", ("t2i_XL_stage2_512.pt",), 777_923_840, 183, 0, 512),
    # DiT (Peebles & Xie 2023)
    _dit("S/2", 12, 32_963_360),
    _dit("B/2", 12, 130_512_416),
    _dit("L/2", 24, 458_102_816),
    Release("dit", "XL/2", ("DiT-XL-2-256x256.pt", "facebook/DiT-XL-2-256"), 675_129_632, 144, 1, 256, 2.27, 278.24),
    Release("dit", "XL/2", ("DiT-XL-2-512x512.pt", "facebook/DiT-XL-2-512"), 676_014_368, 144, 1, 512, 3.04, 240.82),
    # Large-DiT (LLaMA2-Accessory); the released steps are not those of the published rows
    Release("large-dit", "600M", (), 609_836_576, 133, 0, 256),
    Release("large-dit", "3B", ("240218_3b_bs256_step1350k",), 4_237_824_032, 261, 0, 256, 2.10, 304.36),
    Release("large-dit", "7B", ("240218_7b_bs512_step620k",), 7_293_819_936, 261, 0, 256, 2.28, 316.20),
    # MAR (Li et al. 2024)
    Release("mar", "B", ("mar_base/checkpoint-last.pth",), 207_924_768, 122, 0, 256, 2.31, 281.7),
    Release("mar", "L", ("mar_large/checkpoint-last.pth",), 478_326_304, 160, 0, 256, 1.78, 296.0),
    Release("mar", "H", ("mar_huge/checkpoint-last.pth",), 942_403_104, 204, 0, 256, 1.55, 303.7),
    # DDPM (Ho et al. 2020); the second file is that of the original repository
    _ddpm("CIFAR-10", "google/ddpm-cifar10-32", "diffusion_cifar10_model", 3.17, 9.46),
    _ddpm("CelebA-HQ", "google/ddpm-celebahq-256"),
    _ddpm("LSUN bedroom", "google/ddpm-bedroom-256", "diffusion_lsun_bedroom_model", 6.36),
    _ddpm("LSUN church", "google/ddpm-church-256", "diffusion_lsun_church_model", 7.89),
    _ddpm("LSUN cat", "google/ddpm-cat-256", "diffusion_lsun_cat_model", 19.75),
    # LDM (Rombach et al. 2022); the class-conditional one with guidance. Shapes do not tell the first three apart
    Release("ldm", "CelebA-HQ", ("celeba/model.ckpt", "CompVis/ldm-celebahq-256"), *_LDM, 256, 5.11),
    Release("ldm", "FFHQ", ("ffhq/model.ckpt",), *_LDM, 256, 4.98),
    Release("ldm", "LSUN bedroom", ("lsun_bedrooms/model.ckpt",), *_LDM, 256, 2.95),
    Release("ldm", "LSUN church", ("lsun_churches/model.ckpt",), 294_966_916, 121, 89, 256, 4.02),
    Release("ldm", "ImageNet", ("cin/model.ckpt",), 401_433_091, 184, 99, 256, 3.60),
)


def release_of(family: str, parameters: int, image_size: int) -> Release | None:
    """The release that has so many parameters; where several do, the one whose images have that size, or the first."""
    same = [r for r in RELEASES if r.family == family and r.parameters == parameters]
    return next((r for r in same if r.image_size == image_size), same[0] if same else None)
