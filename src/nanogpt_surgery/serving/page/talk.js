// Talk: one prompt and two sides, each a base with adapters dialled in, streamed together.

import { Answer } from "./answer.js";
import { at, make, remember, settled, short } from "./dom.js";
import { ConnectionLost, hashesOf, listen, state, stream } from "./server.js";
import { lookInto } from "./look.js";

const names = ["Left", "Right"];
const reasons = {
  stop: "ended by itself", length: "as many tokens as asked for", time: "out of time",
  cancelled: "stopped", failed: "failed",
};
let known = new Set(); // adapters that a side was offered
let asked = null; // what both sides were asked last

remember(...["prompt", "as-chat", "tint", "seed", "max-new-tokens", "temperature", "top-k", "top-p"].map(at));

const kept = JSON.parse(sessionStorage.getItem("sides") ?? "null");
const sides = names.map((name, number) => makeSide(name, number, kept?.[number]));

function makeSide(name, number, weights) {
  const side = { name, number, weights: weights ?? {}, chosen: Boolean(weights), running: null, asked: [], hashes: null };
  side.title = make("h2", {}, name);
  side.hash = make("code", { class: "soft" });
  side.dials = make("div", { class: "dials" });
  side.text = make("div", {
    class: "answer", role: "group",
    "aria-label": `${name} answer. The arrow keys go from token to token, Enter opens alternatives.`,
  });
  side.note = make("span", { class: "soft" });
  side.changed = make("p", { class: "soft", hidden: true }, "The weights have changed since this answer.");
  side.wrong = make("p", { class: "wrong", role: "alert" });
  side.look = make("button", { type: "button", hidden: true, click: () =>
    lookInto([...side.asked, ...side.answer.ids], side.weights, title(side.weights)) }, "Look into it");
  side.answer = new Answer(side.text, name, (index, token) => goOn(side, index, token));
  at("sides").append(make("section", { class: "card side", "aria-label": `${name} side` },
    make("div", { class: "row between" }, side.title, side.hash), side.dials, side.text, side.wrong, side.changed,
    make("div", { class: "row between foot" }, side.note, side.look)));
  return side;
}

/** A side by its name: base, python, or python 0.5 + rust. */
function title(weights) {
  const parts = Object.entries(weights).map(([name, weight]) => (weight === 1 ? name : `${name} × ${weight}`));
  return parts.join(" + ") || "base";
}

/** Shows the hashes of the weights that made the answer; before there is one, of those in force. */
function showHashes(side) {
  const now = hashesOf(side.weights);
  const hashes = side.hashes ?? now;
  side.hash.textContent = hashes.map(short).join(" + ");
  side.hash.title = `sha256 of the weights: ${hashes.join(", ")}`;
  side.changed.hidden = String(hashes) === String(now);
}

function showSide(side) {
  const { adapters } = state();
  side.title.textContent = title(side.weights);
  showHashes(side);
  if (!asked) side.text.replaceChildren(hint(side, adapters.length));
  const absent = adapters.filter((adapter) => !(adapter.name in side.weights));
  const add = make("select", { "aria-label": `Add an adapter to the ${side.name.toLowerCase()} side`, change: () => {
    side.weights[add.value] = 1;
    dialled(side, true);
  } }, make("option", { value: "", disabled: true, selected: true }, Object.keys(side.weights).length ? "Blend with…" : "Add an adapter…"),
  ...absent.map((adapter) => make("option", { value: adapter.name }, adapter.name)));
  side.dials.replaceChildren(
    ...Object.keys(side.weights).map((name) => dial(side, name)),
    ...(absent.length ? [add] : []));
}

/** What stands where an answer will be. */
function hint(side, adapters) {
  const link = (place) => make("a", { href: `#${place.toLowerCase()}` }, place);
  return make("p", { class: "soft hint" }, ...(side.number && !adapters
    ? ["There is no adapter to compare with yet: train one in ", link("Train"), ", or make one in ", link("Operate"), "."]
    : ["The answer comes here. Each of its tokens can be opened to see what else might have stood there."]));
}

function dial(side, name) {
  const reading = make("output", {}, side.weights[name].toFixed(2));
  const range = make("input", {
    type: "range", min: -1, max: 2, step: 0.05, value: side.weights[name],
    "aria-label": `Weight of ${name} on the ${side.name.toLowerCase()} side`,
    input: () => {
      side.weights[name] = +range.value;
      reading.textContent = (+range.value).toFixed(2);
      side.title.textContent = title(side.weights);
      dialled(side, false);
    },
  });
  const remove = make("button", { type: "button", class: "quiet", "aria-label": `Take ${name} off the ${side.name.toLowerCase()} side`, click: () => {
    delete side.weights[name];
    dialled(side, true);
  } }, "×");
  return make("div", { class: "dial" }, make("span", {}, name), range, reading, remove);
}

const answerAgain = settled(() => asked && answer());

function dialled(side, redraw) {
  side.chosen = true;
  side.hashes = null;
  sessionStorage.setItem("sides", JSON.stringify(sides.map((one) => one.weights)));
  if (redraw) {
    showSide(side);
    side.dials.querySelector("select, input")?.focus();
  }
  answerAgain();
}

/** The right side carries the newest adapter until somebody chooses; adapters that left are taken off. */
listen("state", ({ adapters, model }) => {
  const here = new Set(adapters.map((adapter) => adapter.name));
  const fresh = adapters.filter((adapter) => !known.has(adapter.name));
  if (fresh.length && !sides[1].chosen) sides[1].weights = { [fresh.at(-1).name]: 1 };
  known = here;
  for (const side of sides) {
    for (const name of Object.keys(side.weights)) if (!here.has(name)) delete side.weights[name];
    if (side.dials.contains(document.activeElement)) continue; // nobody's slider is pulled away
    showSide(side);
  }
  at("chat-choice").hidden = !model.chat;
  if (model.chat && sessionStorage.getItem("as-chat") === null) at("as-chat").checked = true;
  at("prompt").placeholder = model.chat ? "Ask something" : "Write the beginning of a text";
});

function question() {
  const chat = at("as-chat").checked && state().model.chat;
  const prompt = at("prompt").value;
  const number = (id) => (at(id).value === "" ? null : +at(id).value);
  return {
    prompt: chat ? `${prompt}\n` : prompt,
    body: {
      ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
      seed: number("seed"), max_new_tokens: number("max-new-tokens"),
      temperature: number("temperature"), top_k: number("top-k"), top_p: number("top-p"),
    },
  };
}

/** Runs some sides in one request; `given` are the ids that each has already. */
async function run(running, given) {
  for (const side of running) side.running?.abort();
  const control = new AbortController();
  for (const side of running) Object.assign(side, { running: control, lost: false, began: performance.now(), before: given ? side.answer.tokens.length : 0 });
  busy();
  const mine = () => running.filter((side) => side.running === control);
  try {
    const body = { ...asked.body, sides: running.map((side) => ({ adapters: side.weights })) };
    if (given) body.continue_with = given;
    for await (const event of stream("/api/talk", body, control.signal)) receive(event, running, control);
    if (mine().length) throw new ConnectionLost("The answer ended before it was done.");
  } catch (error) {
    if (error.name !== "AbortError") {
      for (const side of mine()) {
        side.lost = error instanceof ConnectionLost;
        side.wrong.textContent = side.lost ? "The connection was lost; this side answers again when it is back." : error.message;
      }
    }
  }
  for (const side of mine()) {
    side.running = null;
    side.look.hidden = false;
  }
  busy();
}

function receive(event, running, control) {
  if (event.error && !("side" in event)) throw new Error(event.error.message);
  const side = running[event.side];
  if (side.running !== control) return;
  if (event.prompt_ids) {
    side.asked = event.prompt_ids;
    side.hashes = event.hashes;
    showHashes(side);
  }
  if (event.done) {
    const tokens = side.answer.tokens.length;
    const seconds = (performance.now() - side.began) / 1000;
    side.note.textContent = `${tokens} tokens · ${((tokens - side.before) / seconds).toFixed(0)} a second · ${reasons[event.reason] ?? event.reason}`;
    if (event.error) side.wrong.textContent = event.error.message;
    side.answer.end();
    side.running = null;
    side.look.hidden = false;
    busy();
  } else if ("id" in event && !event.replayed) {
    side.answer.add(event);
  }
}

function busy() {
  const running = sides.some((side) => side.running);
  at("answer-stop").hidden = !running;
  at("answer").textContent = asked && !running ? "Answer again" : "Answer";
  for (const side of sides) side.text.classList.toggle("running", Boolean(side.running));
}

async function answer() {
  for (const side of sides) begin(side);
  await run(sides);
}

function begin(side) {
  side.answer.clear(asked.prompt);
  side.hashes = null;
  side.note.textContent = side.wrong.textContent = "";
  side.look.hidden = true;
}

/** Goes on from another token: what stood before it stays. */
async function goOn(side, index, token) {
  side.answer.cut(index);
  side.answer.add(token.likeliest ? token : { ...token, likeliest: [] });
  side.note.textContent = side.wrong.textContent = "";
  side.text.querySelectorAll(".token")[index]?.classList.add("chosen");
  await run([side], [side.answer.ids]);
}

function stop() {
  for (const side of sides) {
    if (!side.running) continue;
    side.running.abort();
    side.running = null;
    side.note.textContent = `${side.answer.tokens.length} tokens · stopped`;
    side.look.hidden = false;
  }
  busy();
}

listen("connection", ({ on }) => {
  const lost = sides.filter((side) => side.lost);
  if (!on || !lost.length) return;
  for (const side of lost) begin(side);
  run(lost);
});

at("talk-form").addEventListener("submit", (event) => {
  event.preventDefault();
  at("talk-error").textContent = "";
  if (!at("prompt").value) {
    at("talk-error").textContent = "The prompt is empty.";
    return;
  }
  asked = question();
  answer();
});
at("answer-stop").addEventListener("click", stop);
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("talk-form").requestSubmit();
  }
});

function tint() {
  at("sides").classList.toggle("tinted", at("tint").checked);
  at("tint-legend").hidden = !at("tint").checked;
}
at("tint").addEventListener("change", tint);
tint();
