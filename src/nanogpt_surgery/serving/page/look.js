// Look: one text, one chosen token; attention, shares and the logit lens say what led there.

import { arrowKeys, at, figure, make, percent, remember, short, shown } from "./dom.js";
import { hashesOf, listen, post, state } from "./server.js";

let given = null; // an answer of Talk, {ids, text}: looked into by its ids until its text is changed
let blend = null; // what answered there, {title, weights}, where it was not one adapter
let looked = null; // {question, tokens, layers, heads, lens, …}
let chosen = 0; // the token
let weights = null; // attention of the layer, [head][from][to]
let generation = 0; // answers to older questions are dropped

remember(at("look-text"));

/** Opens Look on an answer, with the adapters that made it. */
export function lookInto(ids, weights, title) {
  const names = Object.keys(weights);
  blend = names.length > 1 || (names.length && weights[names[0]] !== 1) ? { title, weights } : null;
  drawAdapters();
  at("look-on").checked = names.length > 0;
  if (names.length) at("look-adapter").value = blend ? title : names[0];
  given = { ids, text: null };
  location.hash = "look";
  look();
}

function drawAdapters() {
  const names = state().adapters.map(({ name }) => name);
  if (blend && !Object.keys(blend.weights).every((name) => names.includes(name))) blend = null;
  const choices = [...names, ...(blend ? [blend.title] : [])];
  const select = at("look-adapter");
  const before = select.value;
  select.replaceChildren(...choices.map((name) => make("option", {}, name)));
  if (choices.includes(before)) select.value = before;
  else if (names.length) select.value = names.at(-1);
  at("look-adapter-label").hidden = at("look-on-label").hidden = !names.length;
  showHashes();
}
listen("state", drawAdapters);

function chosenAdapters() {
  const choice = at("look-adapter").value;
  if (!at("look-on").checked || !choice) return {};
  return choice === blend?.title ? blend.weights : { [choice]: 1 };
}

function showHashes() {
  at("look-hash").textContent = hashesOf(chosenAdapters()).map(short).join(" + ");
}

/** Returns what to look at: the text of the field, or the ids of the answer that stands in it. */
function question() {
  const text = at("look-text").value;
  if (given?.text !== null && given?.text !== text) given = null;
  const most = state().model.look_tokens;
  at("look-note").textContent = given && given.ids.length > most
    ? `The first ${most} of its ${given.ids.length} tokens: more are not looked at.` : "";
  return { ...(given ? { ids: given.ids.slice(0, most) } : { text }), adapters: chosenAdapters() };
}

async function look() {
  const mine = ++generation;
  at("look-error").textContent = "";
  showHashes();
  at("look-form").setAttribute("aria-busy", "true");
  try {
    const asked = question();
    const answer = await post("/api/look", asked);
    if (mine !== generation) return;
    const tokens = answer.tokens.map(({ text }) => text);
    if (String(tokens) !== String(looked?.tokens)) chosen = tokens.length - 1;
    looked = { ...answer, question: asked, tokens };
    if (given) showGiven();
    drawAll();
    await Promise.all([readAttention(), readAttribution()]);
  } catch (error) {
    if (mine === generation) at("look-error").textContent = error.message;
  } finally {
    at("look-form").removeAttribute("aria-busy");
  }
}

/** Puts the answer's text, as the model saw it, into the field. */
function showGiven() {
  at("look-text").value = looked.tokens.join("");
  given.text = at("look-text").value; // a field writes line ends its own way
  at("look-text").dispatchEvent(new Event("input"));
}

function drawAll() {
  at("look-empty").hidden = true;
  at("look-results").hidden = false;
  at("look-tokens").replaceChildren(...looked.tokens.map((text, i) =>
    make("button", { type: "button", class: "token", tabindex: i === chosen ? 0 : -1, click: () => choose(i) }, shown(text))));
  options(at("look-layer"), looked.layers, []);
  options(at("look-head"), looked.heads, ["mean"]);
  drawLens();
  drawMoved();
  mark();
}

function options(select, number, before) {
  if (select.length === number + before.length) return;
  select.replaceChildren(...[...before, ...Array(number).keys()].map((name) => make("option", {}, name)));
}

function choose(position) {
  if (position === chosen) return;
  chosen = position;
  mark();
  drawAttention();
  readAttribution().catch((error) => (at("look-error").textContent = error.message));
}

/** Shows which token is chosen, and how much it looks at each. */
function mark() {
  [...at("look-tokens").children].forEach((button, i) => {
    button.setAttribute("aria-pressed", i === chosen);
    button.style.setProperty("--look", weights ? share(chosen, i) : 0);
  });
  for (const cell of at("lens").querySelectorAll("[data-position]"))
    cell.classList.toggle("chosen", +cell.dataset.position === chosen);
  const answer = looked.lens.layers.at(-1)?.[chosen];
  at("look-chosen").textContent = `${chosen + 1} of ${looked.tokens.length}: “${shown(looked.tokens[chosen])}”` +
    (answer ? ` → “${shown(answer.text)}” ${percent(answer.probability)}` : "");
}

// Attention

const share = (from, to) => {
  if (to > from) return 0;
  const head = at("look-head").value;
  if (head !== "mean") return weights[+head]?.[from]?.[to] ?? 0;
  return weights.reduce((sum, one) => sum + (one[from]?.[to] ?? 0), 0) / weights.length;
};

async function readAttention() {
  const layer = +at("look-layer").value;
  const of = looked;
  const { heads } = await post("/api/look/attention", { ...looked.question, layer });
  if (of !== looked || layer !== +at("look-layer").value) return;
  weights = heads;
  drawHeads();
  drawAttention();
}

function drawHeads() {
  at("heads").replaceChildren(...weights.map((one, head) => {
    const canvas = make("canvas", { "aria-hidden": "true" });
    paint(canvas, looked.tokens.length, (from, to) => one[from]?.[to] ?? 0, 1);
    return make("button", { type: "button", "aria-label": `Head ${head}`, click: () => pickHead(head) },
      canvas, make("span", {}, head));
  }));
}

function pickHead(head) {
  at("look-head").value = head;
  drawAttention();
}

function drawAttention() {
  if (!weights) return;
  [...at("heads").children].forEach((button, head) =>
    button.setAttribute("aria-pressed", String(head) === at("look-head").value));
  const count = looked.tokens.length;
  const canvas = at("attention");
  paint(canvas, count, share, Math.max(1, Math.min(24, Math.floor(420 / count))), chosen);
  const most = [...looked.tokens.keys()].sort((a, b) => share(chosen, b) - share(chosen, a)).slice(0, 3);
  const reading = `“${shown(looked.tokens[chosen])}” looks at ` +
    most.map((i) => `“${shown(looked.tokens[i])}” ${percent(share(chosen, i))}`).join(", ") + ".";
  at("attention-reading").textContent = reading;
  canvas.setAttribute("aria-label", `Attention, ${at("look-head").value === "mean" ? "mean of the heads" : `head ${at("look-head").value}`}, layer ${at("look-layer").value}. ${reading}`);
  mark();
}

/** Fills a canvas with a square of shares, in the accent's colour. */
function paint(canvas, count, value, size, row) {
  canvas.width = canvas.height = count * size;
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  context.fillStyle = style.getPropertyValue("--wash");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = style.getPropertyValue("--accent");
  for (let from = 0; from < count; from++)
    for (let to = 0; to <= from; to++) {
      context.globalAlpha = Math.min(1, value(from, to));
      context.fillRect(to * size, from * size, size, size);
    }
  context.globalAlpha = 1;
  if (row === undefined) return;
  context.strokeStyle = style.getPropertyValue("--ink");
  context.strokeRect(0.5, row * size + 0.5, (row + 1) * size - 1, Math.max(size - 1, 1));
}

const cellUnder = (event) => {
  const box = at("attention").getBoundingClientRect();
  const place = (offset, length) => Math.floor((offset / length) * looked.tokens.length);
  return [place(event.clientY - box.top, box.height), place(event.clientX - box.left, box.width)];
};
at("attention").addEventListener("mousemove", (event) => {
  if (!weights) return;
  const [from, to] = cellUnder(event);
  if (!(from in looked.tokens) || !(to in looked.tokens)) return;
  at("attention-reading").textContent =
    `“${shown(looked.tokens[from])}” looks at “${shown(looked.tokens[to])}”: ${percent(share(from, to), 1)}`;
});
at("attention").addEventListener("mouseleave", drawAttention);
at("attention").addEventListener("click", (event) => choose(Math.min(cellUnder(event)[0], looked.tokens.length - 1)));
at("look-layer").addEventListener("change", () => readAttention().catch((error) => (at("look-error").textContent = error.message)));
at("look-head").addEventListener("change", drawAttention);

// Shares

async function readAttribution() {
  const position = chosen;
  const of = looked;
  const answer = await post("/api/look/attribution", { ...looked.question, position });
  if (of !== looked || position !== chosen) return;
  at("attribution-title").textContent = `in the logit of “${shown(answer.token.text)}”, ${figure(answer.logit, 2)}`;
  const parts = [
    ...answer.heads.flatMap((heads, layer) => heads.map((value, head) => ({ layer, head, value, name: `layer ${layer}, head ${head}` }))),
    ...answer.mlp.map((value, layer) => ({ layer, value, name: `layer ${layer}, MLP` })),
    ...(Number.isFinite(answer.embedding) ? [{ value: answer.embedding, name: "embedding" }] : []),
  ];
  const most = Math.max(...parts.map(({ value }) => Math.abs(value)), 1e-9);
  const first = [...parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 6);
  at("most").replaceChildren(...first.map(({ name, value }) =>
    make("div", {}, make("span", {}, name),
      make("i", { class: value < 0 ? "less" : "more", "--p": Math.abs(value) / most }),
      make("span", { class: "number" }, (value > 0 ? "+" : "") + figure(value, 2)))));
  drawShares(answer, most);
}

function drawShares(answer, most) {
  const cell = (value, name, open) => {
    const part = { class: `share ${value < 0 ? "less" : "more"}`, "--p": Math.abs(value) / most,
      title: `${name}: ${figure(value, 3)}`, "aria-label": `${name}: ${figure(value, 3)}` };
    return make("td", {}, open ? make("button", { type: "button", tabindex: -1, ...part, click: open }) : make("span", { role: "img", ...part }));
  };
  const rows = answer.heads.map((heads, layer) =>
    make("tr", {}, make("th", { scope: "row" }, layer),
      ...heads.map((value, head) => cell(value, `Layer ${layer}, head ${head}`, () => openHead(layer, head))),
      cell(answer.mlp[layer], `Layer ${layer}, MLP`)));
  const table = make("table", { class: "shares" },
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "layer"),
      ...answer.heads[0].map((_, head) => make("th", { scope: "col" }, head)), make("th", { scope: "col" }, "MLP"))),
    make("tbody", {}, ...rows.reverse()));
  at("attribution").replaceChildren(table);
  const first = table.querySelector("button");
  if (first) first.tabIndex = 0;
}

function openHead(layer, head) {
  at("look-head").value = head;
  if (+at("look-layer").value === layer) return drawAttention();
  at("look-layer").value = layer;
  at("look-layer").dispatchEvent(new Event("change"));
}

arrowKeys(at("attribution"), "button");

// The lens

function drawLens() {
  const layers = looked.lens.layers;
  const heading = (layer) => (layer ? layer : "emb");
  const rows = layers.map((answers, layer) =>
    make("tr", {}, make("th", { scope: "row" }, heading(layer)),
      ...answers.map(({ text, probability, rank }, i) =>
        make("td", {
          "data-position": i, "--p": probability, click: () => choose(i),
          title: `${percent(probability, 1)}${Number.isInteger(rank) ? `; the final answer is number ${rank + 1} here` : ""}`,
        }, shown(text)))));
  at("lens").replaceChildren(make("table", { class: "lens" },
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "layer"),
      ...looked.tokens.map((text, i) => make("th", { scope: "col", "data-position": i }, shown(text))))),
    make("tbody", {}, ...rows.reverse())));
}

function drawMoved() {
  const moved = looked.moved ?? [];
  at("moved-card").hidden = !moved.length;
  at("moved").replaceChildren(make("table", {},
    make("thead", {}, make("tr", {}, ...["After", "Token", "Without", "With"].map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...moved.map((one) => make("tr", {},
      make("td", {}, make("code", {}, shown(looked.tokens[one.position] ?? ""))), make("td", {}, make("code", {}, shown(one.text))),
      make("td", { class: "number" }, percent(one.without, 1)), make("td", { class: "number" }, percent(one.with_it, 1)))))));
}

arrowKeys(at("look-tokens"), ".token");
at("look-tokens").addEventListener("focusin", (event) => choose([...at("look-tokens").children].indexOf(event.target)));
at("look-form").addEventListener("submit", (event) => {
  event.preventDefault();
  look();
});
for (const id of ["look-on", "look-adapter"])
  at(id).addEventListener("change", () => (looked ? look() : showHashes()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (!weights) return;
  drawHeads();
  drawAttention();
});
