// Draws what content.py computed. Nothing is fitted or chosen here: every answer is looked up by budget.
"use strict";

const content = JSON.parse(document.getElementById("content").textContent);
const { axes, budgets, families, recipes, cells, laws, metrics, score } = content;
const byId = (id) => document.getElementById(id);
const state = { axis: Object.keys(axes)[0], step: 0, hidden: new Set(), family: families[0].key, images: 0 };

/** An element with attributes and children; strings become text nodes, so no text is ever read as HTML. */
function make(tag, attributes = {}, ...children) {
  const element = tag === "svg" || tag === "path" || tag === "circle" || tag === "rect" || tag === "polygon"
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// ---- numbers ---------------------------------------------------------------------------------------

const digits = (value, count) => String(Number(value.toPrecision(count)));
const withPrefix = (value, space, unit, count) => {
  const power = Math.max(0, Math.min(5, Math.floor(Math.log10(value) / 3 + 1e-9)));
  return `${digits(value / 1000 ** power, count)}${space}${["", "k", "M", "G", "T", "P"][power]}${unit}`;
};

/** Bits as a size in bytes, or as a number of bit operations. */
function amount(bits, axis = state.axis, count = 3) {
  return axes[axis].unit === "bytes" ? withPrefix(bits / 8, " ", "B", count) : withPrefix(bits, "", " bit²", count);
}
const parameters = (value) => withPrefix(value, "", "", 3);
const fixed = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
const range = (low, high) => (low === undefined ? "" : ` (${fixed(low)}–${fixed(high)})`);
const cellName = (cell) => `${cell.model} at ${recipes[cell.recipe].label}`;
const recipeColor = (key) => getComputedStyle(recipes[key].chip).getPropertyValue("color");
const css = (name) => {
  const probe = make("span", { style: `color: var(${name})` });
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
};
const faded = (color, alpha) => color.replace(/^rgb\((.*)\)$/, `rgba($1, ${alpha})`);

// ---- controls --------------------------------------------------------------------------------------

/** Radio buttons in a fieldset; `options` is [value, label or element, accessible name]. */
function radios(fieldset, name, options, chosen, change) {
  const legend = fieldset.querySelector("legend");
  fieldset.replaceChildren(legend, ...options.map(([value, label, spoken]) => {
    const input = make("input", { type: "radio", name, value });
    if (spoken) input.setAttribute("aria-label", spoken);
    input.checked = value === chosen;
    input.addEventListener("change", () => change(value));
    return make("label", {}, input, label);
  }));
}

/** A short line with the marker in its middle, as the plots draw it. */
function swatch({ dash, symbol }) {
  const dashes = { solid: "", dash: "7 4", dot: "2 4", dashdot: "7 3 2 3" }[dash];
  const shapes = {
    circle: make("circle", { cx: 17, cy: 6, r: 4 }),
    square: make("rect", { x: 13, y: 2, width: 8, height: 8 }),
    "triangle-up": make("polygon", { points: "17,1 22,10 12,10" }),
    "triangle-down": make("polygon", { points: "17,11 22,2 12,2" }),
    diamond: make("polygon", { points: "17,0.5 22.5,6 17,11.5 11.5,6" }),
    cross: make("polygon", { points: "15.5,1 18.5,1 18.5,4.5 22,4.5 22,7.5 18.5,7.5 18.5,11 15.5,11 15.5,7.5 12,7.5 12,4.5 15.5,4.5" }),
    star: make("polygon", { points: "17,0.5 18.4,4.4 22.4,4.5 19.2,7 20.4,11 17,8.6 13.6,11 14.8,7 11.6,4.5 15.6,4.4" }),
    pentagon: make("polygon", { points: "17,1 22,4.6 20.1,10.5 13.9,10.5 12,4.6" }),
  };
  const line = make("path", { d: "M1 6H33", stroke: "currentColor", "stroke-width": 2.2, "stroke-dasharray": dashes });
  shapes[symbol].setAttribute("fill", "currentColor");
  return make("svg", { class: "swatch", viewBox: "0 0 34 12", "aria-hidden": "true" }, line, shapes[symbol]);
}

function drawKey() {
  for (const [key, recipe] of Object.entries(recipes)) {
    const mark = make("span", { style: `color: light-dark(${recipe.light}, ${recipe.dark})` }, swatch(recipe));
    recipe.chip = mark;
    const chip = make("button", { type: "button", "aria-pressed": "true" }, mark, recipe.label);
    chip.addEventListener("click", () => {
      if (!state.hidden.delete(key)) state.hidden.add(key);
      chip.setAttribute("aria-pressed", String(!state.hidden.has(key)));
      drawPlots();
    });
    byId("key").append(chip);
  }
}

// ---- the answer ------------------------------------------------------------------------------------

const answersOf = (family) => laws[family][state.axis].answers;

function chooseAxis(axis) {
  state.axis = axis;
  const slider = byId("slider");
  slider.max = budgets[axis].values.length - 1;
  slider.value = state.step = budgets[axis].initial;
  byId("axis-note").textContent = axes[axis].note;
  for (const part of document.querySelectorAll("[data-axis]")) part.hidden = part.dataset.axis !== axis;
  drawTicks();
  drawRibbons();
  drawAnswer();
  drawPlots();
}

function drawAnswer() {
  const budget = budgets[state.axis].values[state.step];
  byId("budget").textContent = amount(budget);
  byId("slider").setAttribute("aria-valuetext", amount(budget));
  byId("answers").replaceChildren(...families.map((family) => card(family, answersOf(family.key)[state.step], budget)));
  for (const segment of document.querySelectorAll(".ribbon span")) {
    segment.classList.toggle("now", state.step >= segment.dataset.first && state.step <= segment.dataset.last);
  }
}

function card(family, answer, budget) {
  const parts = [make("h3", {}, family.label)];
  if (answer.cell === null) {
    const smallest = cells[laws[family.key][state.axis].smallest];
    parts.push(make("p", { class: "pick" }, "Nothing measured fits"),
      make("p", { class: "muted" }, `The smallest is ${cellName(smallest)}: ${amount(smallest.bits[state.axis])}.`));
  } else {
    const cell = cells[answer.cell];
    const { value, low, high } = cell.metrics[score.key];
    parts.push(make("p", { class: "pick" }, cellName(cell)),
      make("p", { class: "score" }, make("strong", {}, `${score.label} ${fixed(value)}`), range(low, high),
        make("span", { class: "muted" }, ` · measured · ${amount(cell.bits[state.axis])}`)));
    if (answer.ties.length) {
      parts.push(make("p", { class: "muted small" },
        `Intervals overlap with ${answer.ties.map((id) => `${cellName(cells[id])} (${fixed(cells[id].metrics[score.key].value)})`).join(", ")}.`));
    }
  }
  if (answer.law) parts.push(make("p", { class: "small" }, `By the law: ${lawText(answer.law)}`));
  if (answer.beyond) {
    parts.push(make("p", { class: "small" }, make("span", { class: "badge" }, "extrapolates"), ` ${lawText(answer.beyond)}`));
  }
  if (answer.cell !== null && cells[answer.cell].picture) {
    parts.push(make("img", { class: "strip", src: cells[answer.cell].picture, alt: `Samples of ${cellName(cells[answer.cell])}` }));
  }
  return make("article", { class: "card", "data-family": family.key }, ...parts);
}

function lawText({ recipe, score: found, low, high, parameters: count, smaller, larger, share }) {
  let where = `between ${smaller} and ${larger}`;
  if (smaller === null) where = `smaller than ${larger}`;
  if (larger === null) where = `larger than ${smaller}`;
  return `${recipes[recipe].label} with about ${parameters(count)} parameters (${where}), ` +
    `${score.label} ${fixed(found)}${range(low, high)}, lowest in ${share > 0.99 ? "> 99" : Math.round(100 * share)} % of resamples.`;
}

function drawTicks() {
  const values = budgets[state.axis].values;
  const last = values.length - 1;
  const ticks = values.flatMap((value, step) => {
    const bytes = axes[state.axis].unit === "bytes" ? value / 8 : value;
    return Math.abs(Math.log10(bytes) - Math.round(Math.log10(bytes))) < 1e-6 ? [[step, value]] : [];
  });
  byId("ticks").replaceChildren(...ticks.map(([step, value]) =>
    make("span", { style: `left: ${(100 * step) / last}%` }, amount(value))));
}

/** What each family's answer is along the slider: one segment for every run of budgets with the same answer. */
function drawRibbons() {
  const last = budgets[state.axis].values.length - 1;
  byId("ribbons").replaceChildren(...families.map((family) => {
    const ribbon = make("div", { class: "ribbon" }, make("b", {}, family.label));
    const answers = answersOf(family.key);
    for (let first = 0, end; first <= last; first = end + 1) {
      end = first;
      while (end < last && answers[end + 1].cell === answers[first].cell) end += 1;
      if (answers[first].cell === null) continue;
      const cell = cells[answers[first].cell];
      const recipe = recipes[cell.recipe];
      const [left, right] = [first, Math.min(end + 1, last)].map((step) => (100 * step) / last);
      const width = ((right - left) / 100) * byId("ticks").clientWidth;
      const label = [`${cell.size} ${recipe.label}`, cell.size].find((text) => text.length * 7 + 8 < width) ?? "";
      ribbon.append(make("span", {
        "data-first": first, "data-last": end, class: end === last ? "open" : "",
        style: `left: ${left}%; width: ${right - left}%; color: light-dark(${recipe.light}, ${recipe.dark})`,
      }, make("i", {}, label)));
    }
    ribbon.addEventListener("click", (event) => {
      const box = ribbon.getBoundingClientRect();
      byId("slider").value = state.step = Math.round((last * (event.clientX - box.left)) / box.width);
      drawAnswer();
      moveBudget();
    });
    return ribbon;
  }));
}

// ---- the laws --------------------------------------------------------------------------------------

function hoverText(cell) {
  const lines = [`<b>${cell.model} ${recipes[cell.recipe].label}</b> · ${cell.method}, seed ${cell.seeds.join(", ")}`];
  for (const { key, label } of metrics) {
    const found = cell.metrics[key];
    if (found) lines.push(`${label} ${digits(found.value, 3)}${found.low === undefined ? "" : ` (${digits(found.low, 3)}–${digits(found.high, 3)})`}`);
  }
  for (const [key, axis] of Object.entries(axes)) lines.push(`${axis.label}: ${amount(cell.bits[key], key)}`);
  lines.push(`${parameters(cell.parameters)} parameters · ${digits(cell.seconds, 2)} s`);
  return lines.join("<br>");
}

function traces(family) {
  const law = laws[family][state.axis];
  const result = [];
  for (const [key, recipe] of Object.entries(recipes)) {
    if (state.hidden.has(key)) continue;
    const color = recipeColor(key);
    const curve = law.curves[key];
    if (curve) {
      const line = { x: curve.x, mode: "lines", hoverinfo: "skip", showlegend: false };
      result.push({ ...line, y: curve.high, line: { width: 0 } },
        { ...line, y: curve.low, line: { width: 0 }, fill: "tonexty", fillcolor: faded(color, 0.09) },
        { ...line, y: curve.y, line: { color, width: 1.8, dash: recipe.dash } });
    }
    const own = cells.filter((cell) => cell.family === family && cell.recipe === key && cell.metrics[score.key]);
    const scores = own.map((cell) => cell.metrics[score.key]);
    result.push({
      x: own.map((cell) => cell.bits[state.axis]), y: scores.map((found) => found.value), mode: "markers", showlegend: false,
      error_y: { type: "data", symmetric: false, color, thickness: 1.3, width: 0,
        array: scores.map((found) => (found.high ?? found.value) - found.value),
        arrayminus: scores.map((found) => found.value - (found.low ?? found.value)) },
      marker: { color, size: 9, symbol: recipe.symbol, line: { color: css("--surface"), width: 1 } },
      text: own.map(hoverText), hovertemplate: "%{text}<extra></extra>",
    });
  }
  const front = law.front.map((id) => cells[id]);
  result.unshift({
    x: front.map((cell) => cell.bits[state.axis]), y: front.map((cell) => cell.metrics[score.key].value),
    mode: "lines", line: { color: faded(css("--muted"), 0.35), width: 7, shape: "hv" }, hoverinfo: "skip", showlegend: false,
  });
  result.push({ ...chosenPoint(family), mode: "markers", hoverinfo: "skip", showlegend: false,
    marker: { symbol: "circle-open", size: 20, color: css("--ink"), line: { width: 2 } } });
  return result;
}

/** 1-2-5 ticks of a log axis between two values. */
function logTicks(low, high, steps) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
    for (const step of steps) if (step * 10 ** power >= low && step * 10 ** power <= high) ticks.push(step * 10 ** power);
  }
  return ticks;
}

function layout(family) {
  const { x: [left, right], y: [bottom, top] } = laws[family][state.axis].view;
  const unit = axes[state.axis].unit === "bytes" ? 8 : 1;
  const xTicks = logTicks(left / unit, right / unit, right / left > 300 ? [1] : [1, 3]).map((value) => value * unit);
  const yTicks = logTicks(bottom, top, top / bottom > 8 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8]);
  const [ink, line] = [css("--muted"), css("--line")];
  const font = getComputedStyle(document.documentElement).fontFamily;
  const axis = { type: "log", gridcolor: line, linecolor: line, zeroline: false, tickmode: "array", fixedrange: coarse, automargin: true };
  return {
    uirevision: state.axis, dragmode: coarse ? false : "zoom", hovermode: "closest", showlegend: false,
    margin: { l: 48, r: 14, t: 10, b: 46 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: font, size: 12, color: ink },
    hoverlabel: { bgcolor: css("--surface"), bordercolor: line, align: "left", font: { color: css("--ink"), size: 12, family: font } },
    xaxis: { ...axis, title: { text: axes[state.axis].title, standoff: 10 }, range: [left, right].map(Math.log10),
      tickvals: xTicks, ticktext: xTicks.map((value) => amount(value)) },
    yaxis: { ...axis, title: { text: `${score.label} (lower is better)`, standoff: 6 }, range: [bottom, top].map(Math.log10),
      tickvals: yTicks, ticktext: yTicks.map((value) => digits(value, 2)) },
    shapes: budgetLine(),
  };
}

function budgetLine() {
  const x = budgets[state.axis].values[state.step];
  return [{ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: css("--accent"), width: 1.5, dash: "dot" } }];
}

/** Where the cell is that the slider's budget names. */
function chosenPoint(family) {
  const { cell } = answersOf(family)[state.step];
  return cell === null ? { x: [], y: [] } : { x: [cells[cell].bits[state.axis]], y: [cells[cell].metrics[score.key].value] };
}

const coarse = matchMedia("(pointer: coarse)").matches;
const plotOf = (family) => byId(`plot-${family.key}`);

function drawPlots() {
  for (const family of families) {
    Plotly.react(plotOf(family), traces(family.key), layout(family.key), { displayModeBar: false, responsive: true });
  }
}

function moveBudget() {
  for (const family of families) {
    const { x, y } = chosenPoint(family.key);
    const plot = plotOf(family);
    Plotly.update(plot, { x: [x], y: [y] }, { shapes: budgetLine() }, [plot.data.length - 1]);
  }
}

// ---- sample pictures -------------------------------------------------------------------------------

const COLUMNS_SHOWN = 2; // tiles of a strip in one cell of the table

function tiles(cell, side) {
  const { columns, rows } = content.samples;
  return make("span", { class: "tiles", style: `width: ${side * COLUMNS_SHOWN}px; height: ${side * rows}px; ` +
    `background-image: url(${cell.picture}); background-size: ${side * columns}px ${side * rows}px; ` +
    `background-position: ${-side * COLUMNS_SHOWN * state.images}px 0` });
}

function drawSamples() {
  const own = cells.filter((cell) => cell.family === state.family);
  const models = [...new Set(own.map((cell) => cell.model))];
  const shown = Object.keys(recipes).filter((key) => own.some((cell) => cell.recipe === key));
  const head = make("tr", {}, make("th", { scope: "col" }, "Model"), ...shown.map((key) => make("th", { scope: "col" }, recipes[key].label)));
  const rows = models.map((model) => make("tr", {}, make("th", { scope: "row" }, model), ...shown.map((key) => {
    const cell = own.find((other) => other.model === model && other.recipe === key);
    if (!cell?.picture) return make("td", { class: "muted" }, "–");
    const button = make("button", { type: "button", "aria-label": `${cellName(cell)}, ${score.label} ${fixed(cell.metrics[score.key].value)}: show all images` },
      tiles(cell, content.samples.side * 2), fixed(cell.metrics[score.key].value));
    button.addEventListener("click", () => showDetail(cell, own));
    return make("td", {}, button);
  })));
  byId("samples").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));

  const example = own.findLast((cell) => cell.picture && recipes[cell.recipe].full) ?? own.find((cell) => cell.picture);
  if (!example) return;
  const chosen = state.images;
  const options = Array.from({ length: Math.floor(content.samples.columns / COLUMNS_SHOWN) }, (_, index) => {
    state.images = index;
    const first = index * COLUMNS_SHOWN + 1;
    return [index, tiles(example, content.samples.side), `Images ${first} to ${first + COLUMNS_SHOWN - 1}`];
  });
  state.images = chosen;
  radios(byId("sample-images"), "images", options, chosen, (index) => {
    state.images = index;
    drawSamples();
    byId("sample-images").querySelectorAll("input")[index].focus();
  });
}

function showDetail(cell, own) {
  const full = own.find((other) => other.model === cell.model && recipes[other.recipe].full && other !== cell);
  byId("detail-title").textContent = cellName(cell);
  byId("detail-body").replaceChildren(...[cell, full].filter((shown) => shown?.picture).flatMap((shown) => {
    const { value, low, high } = shown.metrics[score.key];
    return [
      make("p", {}, make("strong", {}, recipes[shown.recipe].label), ` · ${score.label} ${fixed(value)}${range(low, high)} · ${amount(shown.bits[state.axis])}`),
      make("img", { class: "strip", src: shown.picture, alt: `Samples of ${cellName(shown)}` }),
    ];
  }));
  byId("detail").showModal();
}

// ---- tables ----------------------------------------------------------------------------------------

/** Sort a table's rows by a column; cells carry their number in data-value. Empty cells stay last. */
function sortTable(header) {
  const table = header.closest("table");
  const column = [...header.parentNode.children].indexOf(header);
  const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const keyed = [...table.tBodies[0].rows].map((row) => {
    const { dataset, textContent } = row.cells[column];
    return { row, key: dataset.value === undefined ? textContent.trim() : dataset.value && Number(dataset.value) };
  });
  keyed.sort((a, b) => {
    if (a.key === "" || b.key === "") return (a.key === "") - (b.key === "");
    return direction * (typeof a.key === "number" ? a.key - b.key : a.key.localeCompare(b.key, "en", { numeric: true }));
  });
  table.tBodies[0].append(...keyed.map(({ row }) => row));
}

function linkCsv() {
  const table = document.querySelector("#cells-title ~ .scroll table");
  const quote = (text) => `"${text.replaceAll('"', '""')}"`;
  const lines = [...table.rows].map((row) =>
    [...row.cells].map((cell) => cell.dataset.value ?? quote(cell.textContent.trim())).join(","));
  byId("csv").href = `data:text/csv;charset=utf-8,${encodeURIComponent(lines.join("\n"))}`;
}

// ---- start -----------------------------------------------------------------------------------------

drawKey();
for (const family of families) {
  byId("plots").append(make("figure", {}, make("figcaption", {}, family.label),
    make("div", { class: "plot", id: `plot-${family.key}`, role: "img",
      "aria-label": `${score.label} of ${family.label} against the budget, one line per precision. The table of all cells has the numbers.` })));
}
radios(byId("axes"), "axis", Object.entries(axes).map(([key, axis]) => [key, axis.label]), state.axis, chooseAxis);
radios(byId("sample-family"), "family", families.map(({ key, label }) => [key, label]), state.family, (family) => {
  state.family = family;
  drawSamples();
});
byId("slider").addEventListener("input", (event) => {
  state.step = Number(event.target.value);
  drawAnswer();
  moveBudget();
});
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = getComputedStyle(root).colorScheme === "dark"
    || (getComputedStyle(root).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  root.style.colorScheme = dark ? "light" : "dark";
  drawPlots();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPlots);
addEventListener("resize", () => {
  drawRibbons();
  drawAnswer();
});
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sortTable(button.closest("th")));
}
chooseAxis(state.axis);
drawSamples();
linkCsv();
