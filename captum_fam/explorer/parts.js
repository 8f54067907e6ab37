"use strict";

// The mode of shared parts: which part each place belongs to, and what each part adds to the score. A part is a
// number, from 0; a place may have none: null. This is in one script with page.js, which it uses.

const isParts = () => "colours" in data.modes[state.mode];

// How strong each part is at the places of an image, from 0 to 1.
function strengthsOf(side) {
  const count = (of) => mode()[of][0] * mode()[of][1];
  const [values] = matrixOf(mode());
  return data.modes[state.mode].colours.map((_, part) => {
    const start = part * (count("query") + count("reference")) + (side === "query" ? 0 : count("query"));
    return values.subarray(start, start + count(side));
  });
}

function strongestAt(all, place) {
  const values = all.map((strengths) => strengths[place]);
  const most = Math.max(...values);
  return most > 0 ? values.indexOf(most) : null;
}

// Where a part is strongest: of the places that belong to it, or of all.
function topOf(all, part, anywhere) {
  let top = null;
  all[part].forEach((value, place) => {
    const isMore = value > (top === null ? 0 : all[part][top]);
    if (isMore && (anywhere || strongestAt(all, place) === part)) top = place;
  });
  return top;
}

// What is pointed at: a place of an image and its part, or a part in the table.
function partUnder(at) {
  if (!at) return {place: null, part: null};
  if ("part" in at) return {place: null, part: at.part};
  const place = placeOf(at);
  return {side: at.side, place, part: strongestAt(strengthsOf(at.side), place)};
}

function drawParts() {
  const {colours} = data.modes[state.mode];
  const pointed = partUnder(state.at);
  const alone = pointed.part ?? state.part;
  for (const side of SIDES) {
    const all = strengthsOf(side);
    paint(side, mode()[side], (place) => {
      const part = alone ?? strongestAt(all, place) ?? 0;
      return [colours[part], Math.sqrt(all[part][place])];
    });
    if (side === pointed.side) {
      box(side, pointed.place, pointed.part === null ? "\u2013" : pointed.part + 1, " here");
      continue;
    }
    for (const part of alone === null ? colours.keys() : [alone]) {
      const top = topOf(all, part, alone !== null);
      if (top !== null) box(side, top, part + 1, "");
    }
  }
  bar(0, null);
  element("matches").replaceChildren();
  element("free").disabled = state.part === null;
  for (const row of document.querySelectorAll("#sums [data-own]")) {
    row.classList.toggle("alone", Number(row.dataset.own) === alone);
    row.querySelector("button").setAttribute("aria-pressed", String(Number(row.dataset.own) === state.part));
  }
  element("live").textContent = sentenceOfPart(pointed, alone);
}

function sentenceOfPart({side, place, part}, alone) {
  const belongs = part === null ? "has no part" : `belongs most to part ${part + 1}`;
  const here = place === null ? "" : `The ${side}'s ${named(side, place)}, ${belongs}. `;
  if (alone === null) {
    return `${here}Each place has the colour of its strongest part, and the number of a part is where it is strongest. Point at a place, or at a part in the table, to see that part alone.`;
  }
  const total = signed(mode().totals[alone]);
  return `${here}Part ${alone + 1} adds ${toScore(mode().sums[`part ${alone + 1}`])}; with half of its pairs with other parts, ${total}.`;
}

// Beside a number of the table, its bar; and a part is a button, to be seen alone.
function drawBar(row, part, value) {
  const {sum, score, remainder, ...terms} = mode().sums;
  if (!(part in terms)) return;
  const [low, high] = [Math.min(0, ...Object.values(terms)), Math.max(0, ...Object.values(terms))];
  const size = high - low || 1;
  const cell = document.createElement("td");
  const drawn = document.createElement("span");
  cell.className = "bar";
  drawn.style.marginLeft = `${(100 * (Math.min(0, value) - low)) / size}%`;
  drawn.style.width = `${(100 * Math.abs(value)) / size}%`;
  cell.append(drawn);
  row.append(cell);
  const colour = data.modes[state.mode].colours[Object.keys(terms).indexOf(part)];
  if (!colour) return;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = part;
  button.style.borderLeftColor = drawn.style.background = `rgb(${colour})`;
  row.dataset.own = Object.keys(terms).indexOf(part);
  row.querySelector("th").replaceChildren(button);
}

function keepPart(part) {
  if (part === null) return;
  state.part = state.part === part ? null : part;
  draw();
}

function listenToBars() {
  const table = element("sums");
  const partOf = (event) => {
    const row = event.target.closest("[data-own]");
    return row ? Number(row.dataset.own) : null;
  };
  const point = (event) => pointAt(partOf(event) === null ? null : {part: partOf(event)});
  table.addEventListener("pointermove", (event) => event.pointerType === "mouse" && point(event));
  table.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && pointAt(null));
  table.addEventListener("click", (event) => keepPart(partOf(event)));
  table.addEventListener("focusin", (event) => event.target.matches(":focus-visible") && point(event));
  table.addEventListener("focusout", () => pointAt(null));
}
