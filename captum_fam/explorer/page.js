"use strict";

// Everything that the page shows comes from the JSON beside this script; nothing is loaded. A place is
// a number, row by row; a side is "query" or "reference".

const data = JSON.parse(document.getElementById("data").textContent);
const BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const RED = [221, 17, 0];
const BLUE = [0, 51, 221];
const STRONGEST = 0.85; // opacity of the largest values
const SIDES = ["query", "reference"];

const similarity = data.similarity === "euclidean" ? "minus squared distance" : data.similarity;

// The words of the modes and maps that the package makes; those of others have their names alone.
const MODES = {
  __proto__: null, // else it has a "constructor"
  score: ["explains the score", "What each pair of places adds to the score; the table below adds them up."],
  alike: ["looks alike", "Cosine of what the network sees at two places. The score is not made of it."],
  "shared parts": ["shared parts", "What both images have, and what each part adds to the score."],
};
const MAPS = {
  own: ["particular to this match", "Red places make this match; blue ones are less alike than the whole images (\"self\")."],
  rest: ["this reference rather than the others", "What speaks for it (red) and for the others (blue)."],
  common: ["in common (FAM)", "What contributes to the similarity, also what all images have."],
  made: ["what the score is made of", "What each place adds to the score, with all places of the other image."],
  alike: ["looks like the other image", "How well each place is matched, less what looks like other images, if there are any."],
  none: ["none", ""],
};
const PARTS = {
  pairs: "pairs of places",
  query_rest: "places of the query with the reference's baseline",
  reference_rest: "places of the reference with the query's baseline",
  rest: "both baselines, which no place has",
  lengths: "minus the squared lengths of both embeddings",
  others: "other pairs of parts",
  no_part: "no part",
  sum: "together",
  score: "the score, of the whole embeddings",
  remainder: "what is missing",
  average: "average over all pairs of places",
  largest: "the largest",
};

const first = data.maps[0] || "none";
const state = {
  shown: 0, // the reference
  mode: data.names[0],
  map: first,
  opacity: 1,
  at: null, // what is pointed at: {side, x, y}, shares of the image's width and height; or {part}, in the table
  pins: [], // pairs that are kept, in the same form: grids of other modes have other places
  part: null, // the part that is kept
};

const element = (id) => document.getElementById(id);
const other = (side) => (side === "query" ? "reference" : "query");
const reference = () => data.references[state.shown];
const mode = () => reference().modes[state.mode];

/* Matrices */

// Numbers are stored as levels of one or two digits of base 64; the share of the largest is a level's square.
function numbers(stored) {
  const count = stored.digits;
  const top = (64 ** count - 2) / 2;
  const values = new Float32Array(stored.text.length / count);
  for (let i = 0; i < values.length; i++) {
    let code = 0;
    for (let d = 0; d < count; d++) code = 64 * code + BASE64.indexOf(stored.text[count * i + d]);
    const share = (code - top) / top;
    values[i] = code > 2 * top ? NaN : stored.largest * share * Math.abs(share);
  }
  return values;
}

const decoded = new Map();

function matrixOf(stored) {
  if (!decoded.has(stored)) {
    decoded.set(stored, stored.whole ? [numbers(stored.whole)] : [numbers(stored.left), numbers(stored.right)]);
  }
  return decoded.get(stored);
}

// The row of a place of the query, or the column of one of the reference: values over the other image.
function line(stored, side, place) {
  const size = (of) => stored[of][0] * stored[of][1];
  const values = new Float32Array(size(other(side)));
  const [left, right] = matrixOf(stored);
  const columns = size("reference");
  for (let i = 0; i < values.length; i++) {
    if (!right) {
      values[i] = side === "query" ? left[place * columns + i] : left[i * columns + place];
    } else {
      const rank = stored.rank;
      const [here, there] = side === "query" ? [left, right] : [right, left];
      let sum = 0;
      for (let r = 0; r < rank; r++) sum += here[place * rank + r] * there[i * rank + r];
      values[i] = sum;
    }
  }
  return values;
}

/* Places */

function placeOf(point) {
  const [h, w] = mode()[point.side];
  const within = (share, size) => Math.min(size - 1, Math.max(0, Math.floor(share * size)));
  return within(point.y, h) * w + within(point.x, w);
}

function pointOf(side, place) {
  const [h, w] = mode()[side];
  return {side, x: ((place % w) + 0.5) / w, y: (Math.floor(place / w) + 0.5) / h};
}

const named = (side, place) => {
  const w = mode()[side][1];
  return `row ${Math.floor(place / w) + 1}, column ${(place % w) + 1}`;
};

// A pair: a place, and where the other image matches it best.
function pairOf(point) {
  const place = placeOf(point);
  const lines = mode()[point.side === "query" ? "rows" : "columns"];
  return {side: point.side, place, match: lines.best[place], value: lines.value[place], sum: lines.sum[place]};
}

function strongest() {
  const lines = mode().rows;
  return mode().strongest.map(([place, match]) => ({side: "query", place, match, value: lines.value[place]}));
}

/* Drawing */

// Each place in a colour, with an opacity from 0 to 1; or the image alone.
function paint(side, [h, w], colourOf) {
  const stage = element(side);
  const canvas = stage.querySelector("canvas");
  canvas.width = w;
  canvas.height = h;
  stage.classList.toggle("covered", Boolean(colourOf) && state.opacity > 0);
  if (!colourOf) return;
  const context = canvas.getContext("2d");
  const image = context.createImageData(w, h);
  for (let i = 0; i < h * w; i++) {
    const [colour, share] = colourOf(i);
    image.data.set([...colour, Math.round(255 * STRONGEST * state.opacity * Math.min(1, share))], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

const redOrBlue = (values, centre, limit) => (i) => {
  const share = Number.isFinite(values[i]) ? (values[i] - centre) / limit : 0;
  return [share > 0 ? RED : BLUE, Math.abs(share)];
};

function box(side, place, number, kinds) {
  const [h, w] = mode()[side];
  const [row, column] = [Math.floor(place / w), place % w];
  const drawn = document.createElement("div");
  drawn.className = "box" + kinds + (column === 0 ? " left" : "") + (row === 0 ? " top" : "");
  drawn.dataset.number = number;
  drawn.dataset.place = place;
  drawn.style.left = `${(100 * column) / w}%`;
  drawn.style.top = `${(100 * row) / h}%`;
  drawn.style.width = `${100 / w}%`;
  drawn.style.height = `${100 / h}%`;
  const label = document.createElement("span");
  label.textContent = number;
  drawn.append(label);
  element(side).append(drawn);
}

const isSame = (one, two) => one.side === two.side && one.place === two.place;

function draw() {
  document.querySelectorAll(".box").forEach((old) => old.remove());
  if (isParts()) drawParts();
  else drawMatches();
}

function drawMatches() {
  // On a coarser grid, two points may be one place.
  const kept = state.pins.map(pairOf).filter((pair, i, all) => all.findIndex((one) => isSame(one, pair)) === i);
  const pointed = state.at && pairOf(state.at);
  const again = pointed && kept.findIndex((pair) => isSame(pair, pointed));
  const pairs = pointed || kept.length ? [...kept] : strongest();
  if (pointed && again < 0) pairs.push(pointed);
  const current = pointed || kept[kept.length - 1] || null;

  pairs.forEach((pair, i) => {
    const kinds = (current && isSame(pair, current) ? " here" : "") + (i < kept.length ? " kept" : "");
    box(pair.side, pair.place, i + 1, kinds);
    if (pair.match !== null) box(other(pair.side), pair.match, i + 1, kinds);
  });
  element("free").disabled = !kept.length;
  if (current) drawLine(current);
  else drawMap();
  tell(current);
  list(pairs);
}

function drawLine(pair) {
  const {centre, limit} = data.modes[state.mode];
  const there = other(pair.side);
  paint(there, mode()[there], redOrBlue(line(mode(), pair.side, pair.place), centre, limit));
  paint(pair.side, mode()[pair.side], null);
  bar(centre, limit);
}

function drawMap() {
  const maps = reference().maps[state.map];
  for (const side of SIDES) {
    const map = maps && maps[side];
    if (map) paint(side, map.shape, redOrBlue(map.values, 0, data.limits[state.map]));
    else paint(side, [1, 1], null);
  }
  bar(0, maps ? data.limits[state.map] : null);
}

function bar(centre, limit) {
  element("scale").hidden = limit === null;
  if (limit === null) return;
  element("low").textContent = `${short(centre - limit)} or less`;
  element("high").textContent = `${short(centre + limit)} or more`;
}

/* Words */

// A name that is written from right to left does not turn what comes after it.
const apart = (name) => `\u2068${name}\u2069`;

const minus = (text) => text.replace("-", "\u2212");

const signed = (value) => (value > 0 ? "+" : "") + short(value);

// Three digits that count, without powers of ten.
function short(value) {
  if (value === null) return "no number";
  const size = Math.abs(value);
  const decimals = size > 0 ? Math.min(15, Math.max(0, 2 - Math.floor(Math.log10(size)))) : 0;
  return minus(value.toFixed(decimals));
}

function shares(value) {
  const [h, w] = mode().query;
  const [h2, w2] = mode().reference;
  const average = mode().sums.pairs / (h * w * h2 * w2);
  return average > 0 ? `, ${minus((value / average).toFixed(1))}\u00a0\u00d7 the average pair` : "";
}

// What something adds.
function toScore(value) {
  const {score} = reference();
  const share = score > 0 ? ` (${minus(((100 * value) / score).toFixed(1))}% of it)` : "";
  return signed(value) + (score === null ? "" : ` to the score of ${short(score)}${share}`);
}

function tell(pair) {
  element("live").textContent = pair ? sentence(pair) : overview();
}

function overview() {
  const count = mode().strongest.length;
  const [text] = MAPS[state.map] || [state.map];
  const shown = state.map in reference().maps;
  const map = shown ? `The colours show the map \u201c${text}\u201d. ` : "";
  if (!count) return `${map}No two places are the best match of each other, with a value above zero.`;
  const pairs = count === 1 ? "The numbered pair is the strongest match" : `The ${count} numbered pairs are the strongest matches`;
  return `${map}${pairs}: each place is the best match of the other. Point at a place to see all of its matches.`;
}

function sentence(pair) {
  const {side, place, match, value} = pair;
  const here = `The ${side}'s ${named(side, place)}`;
  if (match === null) return `${here} has no match.`;
  const best = `${named(other(side), match)} of the ${other(side)}`;
  if (state.mode === "alike") {
    return `${here}, looks most like ${best}: cosine ${short(value)}, where the average of all pairs is ${short(mode().sums.average)}.`;
  }
  const {sum} = pair;
  if (state.mode !== "score") return `${here}, matches best ${best}: ${short(value)}. All of its matches add up to ${short(sum)}.`;
  const rests = mode()[`${side}_rest`];
  const rest = rests ? rests[place] : 0;
  const more = rest ? `: ${signed(sum)} with the places of the ${other(side)}, ${signed(rest)} with its baseline` : "";
  return `${here}, adds ${toScore(sum + rest)}${more}. Its best match is ${best}: ${signed(value)}${shares(value)}.`;
}

function list(pairs) {
  element("matches").replaceChildren(
    ...pairs.map(({side, place, match, value}) => {
      const item = document.createElement("li");
      const [here, there] = side === "query" ? [place, match] : [match, place];
      const amount = state.mode === "score" ? signed(value) + shares(value) : short(value);
      item.textContent =
        match === null ? `${named(side, place)}: no match` : `${named("query", here)} \u2194 ${named("reference", there)}: ${amount}`;
      return item;
    }),
  );
}

function tables() {
  const body = element("sums").tBodies[0];
  const buttons = () => [...body.querySelectorAll("button")];
  const focused = buttons().indexOf(document.activeElement);
  element("switches")[isParts() ? "before" : "after"](element("sums").parentElement);
  body.replaceChildren(
    ...Object.entries(mode().sums).map(([part, value]) => {
      const row = document.createElement("tr");
      const [name, number] = [document.createElement("th"), document.createElement("td")];
      name.scope = "row";
      name.textContent = part === "score" && similarity ? `${PARTS.score} (${similarity})` : PARTS[part] || part;
      number.textContent = minus(value.toFixed(6)).replace(/^\u2212(0\.0+)$/, "$1");
      number.dataset.part = part;
      number.dataset.value = value;
      row.className = part === "sum" ? "total" : "";
      row.append(name, number);
      if (isParts()) drawBar(row, part, value);
      return row;
    }),
  );
  if (focused >= 0 && isParts()) buttons()[focused].focus();
  element("sums-title").textContent = state.mode === "score" || isParts() ? "What adds up to the score" : "In numbers";
  if (isParts()) {
    element("stored").textContent = "The parts are those of these two images. With another reference they are others, in the same colours.";
    return;
  }
  const {error, largest, rank, unknown} = mode();
  const left = unknown ? `${unknown} entries of the matrix are no numbers and are left out. ` : "";
  const how = rank ? `as two factors of rank ${rank}` : "in few digits";
  element("stored").textContent = largest
    ? `${left}To keep the file small, the matrix is stored ${how}: colours are off by at most ${short(error)}, ${((100 * error) / largest).toPrecision(2)}% of the largest entry. Numbers in words were taken before.`
    : `${left}All ${unknown ? "others" : "entries of the matrix"} are zero.`;
}

const MEANINGS = {cosine: "1 is the same direction, 0 is nothing in common", euclidean: "0 is the same, less is farther apart"};

function headline({score}, isControl) {
  if (!similarity) return "";
  if (score === null) return "Score: no number, as an embedding is not finite.";
  const meaning = MEANINGS[data.similarity] ? ` (${MEANINGS[data.similarity]})` : "";
  const sums = state.mode === "score" ? ` Pairs of places add ${short(mode().sums.pairs)}.` : "";
  const control = data.control === null || isControl ? null : data.references[data.control].score;
  const compared = control === null ? "" : ` The control has ${short(control)}${control >= score ? ", no less" : ""}.`;
  return `Score: ${similarity} ${short(score)}${meaning}.${sums}${compared}`;
}

/* What is shown */

function show() {
  const shown = reference();
  const pictures = {query: data.query, reference: shown};
  for (const side of SIDES) {
    const {name, picture, width, height} = pictures[side];
    const stage = element(side);
    const [h, w] = mode()[side];
    const image = stage.querySelector("img");
    if (image.getAttribute("src") !== picture) image.src = picture;
    image.width = width;
    image.height = height;
    stage.style.setProperty("--shape", width / height);
    stage.style.aspectRatio = `${width} / ${height}`;
    stage.setAttribute("aria-label", `${side} ${name}, ${h} rows and ${w} columns of places`);
    element(`${side}-name`).textContent = name;
  }
  element("pair").classList.toggle("stacked", Math.max(shown.width / shown.height, data.query.width / data.query.height) > 2);
  const names = [data.query.name, shown.name].map((name) => `\u201c${apart(name)}\u201d`);
  const isControl = state.shown === data.control;
  element("title").textContent = isControl ? `Control: ${names.join(" and ")}` : `Why is ${names.join(" similar to ")}?`;
  document.title = `${apart(data.query.name)} and ${apart(shown.name)}`;
  element("score").textContent = headline(shown, isControl);
  element("control").setAttribute("aria-pressed", String(isControl));
  for (const input of document.querySelectorAll("#references input")) input.checked = Number(input.value) === state.shown;
  for (const input of document.querySelectorAll("#modes input")) input.checked = input.value === state.mode;
  element("how").textContent = isParts()
    ? "Point at a place of either image or at a part in the table, or go there with Tab and the arrow keys, to see that part alone in both images. Click, or press Enter, to keep it, and again to let it go."
    : "Point at a place of either image, or go there with Tab and the arrow keys, to see what it matches in the other. Click, or press Enter, to keep the pair, and again to let it go.";
  element("pair").classList.toggle("parts", isParts());
  element("maps").hidden = !data.maps.length || isParts();
  if (state.at && "part" in state.at) state.at = null; // the table is a new one
  tables();
  draw();
}

function choice(group, value, [text, more]) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  label.className = "choice";
  input.type = "radio";
  input.name = group;
  input.value = value;
  label.append(input, ` ${text}`);
  if (more) {
    const small = document.createElement("small");
    small.textContent = more;
    label.append(small);
  }
  return label;
}

function build() {
  for (const name of data.names) element("modes").append(choice("mode", name, MODES[name] || [name]));
  for (const name of [...data.maps, "none"]) element("maps").append(choice("map", name, MAPS[name] || [name]));
  element("maps").querySelector(`[value="${first}"]`).checked = true;

  const strip = document.querySelector("#references .strip");
  data.references.forEach(({name, picture, score}, k) => {
    const amount = score === null ? "" : ` ${short(score)}`;
    const label = choice("shown", k, [`${apart(name)}${amount}${k === data.control ? " (control)" : ""}`]);
    const image = document.createElement("img");
    image.src = picture;
    image.alt = "";
    label.prepend(image);
    strip.append(label);
  });
  // Where the table is beside the images, the switch has a place that does not depend on it.
  if (data.names.some((name) => "colours" in data.modes[name])) element("pair").before(element("modes"));
  element("references").hidden = data.references.length < 2;
  element("switch").hidden = data.names.length < 2;
  element("control").hidden = element("why").hidden = data.control === null;
}

/* What the user does */

let before = 0; // the reference that the control stands in for

function choose(shown) {
  if (state.shown !== data.control) before = state.shown;
  state.shown = shown;
  state.part = null;
  show();
}

const toggleControl = () => choose(state.shown === data.control ? before : data.control);

function changeMode(name) {
  state.mode = name;
  show();
}

function keep(point) {
  if (isParts()) return keepPart(partUnder(point).part);
  const {side, place} = pairOf(point);
  const others = state.pins.filter((pin) => pin.side !== side || placeOf(pin) !== place);
  const isNew = others.length === state.pins.length;
  state.pins = isNew ? [...others, pointOf(side, place)] : others;
  draw();
}

function letAllGo() {
  state.pins = [];
  state.part = null;
  pointAt(null);
}

function pointAt(point) {
  state.at = point;
  draw();
}

function pointUnder(side, event) {
  const frame = element(side).getBoundingClientRect();
  return {side, x: (event.clientX - frame.left) / frame.width, y: (event.clientY - frame.top) / frame.height};
}

const STEPS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};

// Keys with these belong to the browser, and to screen readers.
const isCommand = (event) => event.ctrlKey || event.metaKey || event.altKey;

function onKey(side, event) {
  if (isCommand(event)) return;
  const [h, w] = mode()[side];
  if (event.key in STEPS) {
    const place = state.at && state.at.side === side ? placeOf(state.at) : startOf(side);
    const [down, right] = STEPS[event.key];
    const row = Math.min(h - 1, Math.max(0, Math.floor(place / w) + down));
    const column = Math.min(w - 1, Math.max(0, (place % w) + right));
    pointAt(pointOf(side, row * w + column));
  } else if (event.key === "Enter" || event.key === " ") {
    keep(state.at && state.at.side === side ? state.at : pointOf(side, startOf(side)));
  } else {
    return;
  }
  event.preventDefault();
}

// Where the keys begin: at the strongest match, or part.
function startOf(side) {
  if (isParts()) return topOf(strengthsOf(side), 0, false) ?? 0;
  const [pair] = strongest();
  return pair ? (side === "query" ? pair.place : pair.match) : 0;
}

function listen() {
  for (const side of SIDES) {
    const stage = element(side);
    stage.addEventListener("pointermove", (event) => event.pointerType === "mouse" && pointAt(pointUnder(side, event)));
    stage.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && pointAt(null));
    stage.addEventListener("click", (event) => keep(pointUnder(side, event)));
    stage.addEventListener("keydown", (event) => onKey(side, event));
    stage.addEventListener("focus", () => stage.matches(":focus-visible") && pointAt(pointOf(side, startOf(side))));
    stage.addEventListener("blur", () => pointAt(null));
  }
  listenToBars();
  element("modes").addEventListener("change", (event) => changeMode(event.target.value));
  element("maps").addEventListener("change", (event) => {
    state.map = event.target.value;
    draw();
  });
  element("references").addEventListener("change", (event) => choose(Number(event.target.value)));
  element("opacity").addEventListener("input", (event) => {
    state.opacity = Number(event.target.value);
    draw();
  });
  element("control").addEventListener("click", toggleControl);
  element("free").addEventListener("click", letAllGo);
  document.addEventListener("keydown", (event) => {
    if (isCommand(event)) return;
    if (event.key === "Escape") {
      letAllGo();
    } else if (event.key === "c" && data.control !== null) {
      toggleControl();
    } else if (event.key === "m") {
      changeMode(data.names[(data.names.indexOf(state.mode) + 1) % data.names.length]);
    }
  });
}

build();
listen();
show();
