// Operate: the tree of layers, targets and their plan, adapters, single heads, the journal, save.

import { at, count, figure, make, percent, report, short } from "./dom.js";
import { get, listen, post, refresh, state } from "./server.js";

let layers = [];
let read = null; // the revision that `layers` is of
const targets = new Set(); // paths
const opened = new Set(); // blocks that stand open

// The tree

async function readLayers() {
  const { revision } = state();
  if (read === revision || at("operate").hidden) return;
  read = revision;
  try {
    const found = await get("/api/layers");
    if (read !== revision) return; // newer ones have been asked for
    ({ layers } = found);
    for (const path of targets) if (!layers.some((layer) => layer.path === path && layer.targetable)) targets.delete(path);
    drawLayers();
  } catch (error) {
    if (read === revision) read = null;
    at("operate-status").textContent = error.message;
  }
}

/** Splits a path where a block's number ends: layers.3 and self_attn.q_proj. */
function split(path) {
  const found = /^(.*?\.\d+)(?:\.(.+))?$/.exec(path);
  return found ? [found[1], found[2] ?? ""] : ["", path];
}

function drawLayers() {
  const blocks = new Map();
  for (const layer of layers) {
    const [block, name] = split(layer.path);
    const key = block || layer.path;
    if (!blocks.has(key)) blocks.set(key, []);
    blocks.get(key).push({ ...layer, name: name || layer.path });
  }
  if (!opened.size) for (const key of [...blocks.keys()].filter((name) => /\.\d+$/.test(name)).slice(0, 1)) opened.add(key);
  redraw(at("layers"), [...blocks].map(([key, members]) =>
    members.length === 1 && members[0].path === key ? single(members[0]) : group(key, members)));
  showTargets();
}

/** Puts new children into a box; what had the focus keeps it, and where that is gone, Undo has it. */
function redraw(box, children) {
  const focused = box.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  box.replaceChildren(...children);
  if (focused === undefined) return;
  const same = [...box.querySelectorAll("[data-key]:enabled, summary[data-key]")].find((one) => one.dataset.key === focused);
  (same ?? at("undo")).focus();
}

const size = (layer) => (layer.shape?.length ? layer.shape.join(" × ") : "");

function changed(layer) {
  const relative = layer.adapter?.relative;
  if (!Number.isFinite(relative)) return make("span", {});
  return make("span", { class: "changed", title: `‖ΔW‖/‖W‖ = ${relative}; ${(layer.adapter.names ?? []).join(", ")}` },
    make("i", { "--p": Math.min(1, relative * 5) }), `rank ${layer.adapter.rank} · ${percent(relative, 2)}`);
}

function line(layer) {
  const box = layer.targetable
    ? make("input", { type: "checkbox", checked: targets.has(layer.path), "data-key": layer.path, "data-path": layer.path,
        change: (event) => target([layer.path], event.target.checked) })
    : make("span", { class: "nobox" });
  return make("label", { class: "layer" }, box, make("code", {}, layer.name), make("span", { class: "soft kind" }, layer.kind),
    make("span", { class: "number soft" }, size(layer)), make("span", { class: "number soft wide-only" }, layer.parameters ? count(layer.parameters) : ""), changed(layer));
}

function single(layer) {
  return layer.parameters || layer.targetable ? make("div", { class: "lone" }, line(layer)) : "";
}

function group(key, members) {
  const most = Math.max(0, ...members.map((layer) => layer.adapter?.relative ?? 0));
  const total = members.reduce((sum, layer) => sum + (layer.parameters ?? 0), 0);
  const ablated = members.flatMap((layer) => layer.ablated ?? []).length;
  const notes = [count(total), most ? `‖ΔW‖/‖W‖ to ${percent(most, 2)}` : "", ablated ? `${ablated} ${ablated === 1 ? "head" : "heads"} ablated` : ""];
  return make("details", { open: opened.has(key), toggle: (event) => (event.target.open ? opened.add(key) : opened.delete(key)) },
    make("summary", { "data-key": key }, make("code", {}, key), make("span", { class: "soft" }, notes.filter(Boolean).join(" · "))),
    ...members.flatMap((layer) => [
      layer.parameters || layer.targetable ? line(layer) : "",
      layer.heads ? heads(layer) : "",
    ]));
}

function heads(layer) {
  const block = +/\.(\d+)/.exec(layer.path)[1];
  const gone = new Set(layer.ablated ?? []);
  return make("div", { class: "head-chips", role: "group", "aria-label": `Heads of layer ${block}` },
    make("span", { class: "soft" }, "ablate head"),
    ...Array.from({ length: layer.heads }, (_, head) =>
      make("button", {
        type: "button", class: "chip", "aria-pressed": String(gone.has(head)), "aria-disabled": gone.has(head) ? "true" : null,
        "data-key": `head ${block} ${head}`, "aria-label": gone.has(head) ? `Head ${head} of layer ${block} is ablated` : `Ablate head ${head} of layer ${block}`,
        title: gone.has(head) ? "ablated; undo brings it back" : `ablate head ${head}`,
        click: () => gone.has(head) || operate({ operation: "ablate", layer: block, head }),
      }, head)));
}

// Targets, and the new adapter

function target(paths, on) {
  for (const path of paths) if (on) targets.add(path); else targets.delete(path);
  for (const box of at("layers").querySelectorAll("[data-path]")) box.checked = targets.has(box.dataset.path);
  showTargets();
  at("inject-plan").replaceChildren(); // it was of other targets
}

const last = (path) => path.split(".").at(-1);

/** Returns the targets as short as they can be said: q_proj, where every q_proj is chosen. */
function patterns() {
  const paths = layers.filter((layer) => layer.targetable).map((layer) => layer.path);
  return [...new Set(paths.map(last))].flatMap((name) => {
    const members = paths.filter((path) => last(path) === name);
    const chosen = members.filter((path) => targets.has(path));
    return chosen.length === members.length ? [name] : chosen;
  });
}

function showTargets() {
  const said = patterns();
  at("targets").textContent = said.length
    ? `Targets: ${said.slice(0, 8).join(", ")}${said.length > 8 ? `, and ${said.length - 8} more` : ""} (${targets.size} ${targets.size === 1 ? "layer" : "layers"})`
    : "No targets are chosen: tick layers in the tree.";
  at("inject").disabled = at("inject-plan-button").disabled = !said.length;
}

for (const button of at("presets").children)
  button.addEventListener("click", () => {
    const wanted = {
      qv: (layer) => ["q_proj", "v_proj"].includes(last(layer.path)),
      linear: (layer) => layer.kind.includes("Linear") && last(layer.path) !== "lm_head",
      head: (layer) => last(layer.path) === "lm_head",
      none: () => false,
    }[button.dataset.preset];
    targets.clear();
    target(layers.filter((layer) => layer.targetable && wanted(layer)).map((layer) => layer.path), true);
  });

const injection = () => ({
  operation: "inject", name: at("inject-name").value.trim(), targets: patterns(),
  rank: +at("inject-rank").value, alpha: +at("inject-alpha").value, variant: at("inject-variant").value,
});

at("inject-plan-button").addEventListener("click", async () => {
  at("inject-error").textContent = "";
  try {
    at("inject-plan").replaceChildren(report(await post("/api/operate/plan", injection())));
  } catch (error) {
    at("inject-error").textContent = error.message;
  }
});
at("inject-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (await operate(injection(), at("inject-error"))) target([...targets], false);
});

// Operations

/** Runs an operation and shows its report; returns whether it went through. */
async function operate(body, wrong = at("operate-status"), path = "/api/operate") {
  at("inject-error").textContent = at("save-error").textContent = "";
  at("operate").setAttribute("aria-busy", "true");
  at("operate-status").replaceChildren();
  try {
    const answer = await post(path, body);
    at("operate-status").replaceChildren(report(answer.report ?? answer));
    await refresh();
    return true;
  } catch (error) {
    wrong.replaceChildren(make("span", { class: "wrong" }, error.message));
    return false;
  } finally {
    at("operate").removeAttribute("aria-busy");
  }
}

at("undo").addEventListener("click", () => operate({}, undefined, "/api/undo"));
at("redo").addEventListener("click", () => operate({}, undefined, "/api/redo"));

function drawAdapters(adapters) {
  const act = (operation, name, label, key = label) =>
    make("button", { type: "button", "aria-label": `${label} ${name}`, "data-key": `${key} ${name}`, click: () => operate({ operation, name }) }, label);
  const none = make("p", { class: "soft" }, "The model carries none: tick layers and inject a new one, or train one in ", make("a", { href: "#train" }, "Train"), ".");
  redraw(at("adapters"), !adapters.length ? [none] :
    adapters.map((adapter) =>
      make("div", { class: "adapter" },
        make("div", {}, make("b", {}, adapter.name), " ", make("code", { class: "soft", title: adapter.hash ?? "" }, short(adapter.hash)), " ",
          make("span", { class: adapter.active ? "badge on" : "badge" }, adapter.active ? `on${Number.isFinite(adapter.weight) && adapter.weight !== 1 ? ` × ${figure(adapter.weight, 2)}` : ""}` : "off")),
        make("div", { class: "row" },
          adapter.active ? act("disable", adapter.name, "Disable", "turn") : act("enable", adapter.name, "Enable", "turn"),
          act("merge", adapter.name, "Merge"), act("remove", adapter.name, "Remove")))));
  at("blend-form").hidden = adapters.length < 2;
  const fields = [...at("blend-weights").querySelectorAll("input")].map((field) => field.name);
  if (String(fields) !== String(adapters.map(({ name }) => name)))
    at("blend-weights").replaceChildren(...adapters.map(({ name, weight }) =>
      make("label", {}, name, " ", make("input", { type: "number", name, step: 0.05, min: -1, max: 2, value: weight ?? 1 }))));
}

at("blend-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const weights = {};
  for (const { name, value } of at("blend-weights").querySelectorAll("input")) weights[name] = +value;
  operate({ operation: "blend", weights });
});

function drawJournal({ journal, can_undo: canUndo, can_redo: canRedo }) {
  const turned = [at("undo"), at("redo")].find((one) => one === document.activeElement);
  at("undo").disabled = !canUndo;
  at("redo").disabled = !canRedo;
  if (turned?.disabled) (canUndo ? at("undo") : at("redo")).focus();
  at("journal").replaceChildren(
    ...[...journal].reverse().map((one) =>
      make("li", { class: one.undone ? "undone" : null, value: one.number },
        make("span", {}, one.title, one.undone ? make("em", {}, " undone") : ""),
        make("code", { class: "soft" }, `${short(one.hash_before)} → ${short(one.hash_after)}`))));
  if (!journal.length) at("journal").append(make("li", { class: "soft none" }, "Nothing has been done yet. Each operation stands here with the hashes before and after it."));
}

// Save

at("save-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [what, adapter] = at("save-what").value.split(/:(.*)/s);
  at("save-error").textContent = "";
  try {
    const body = { what, name: at("save-name").value.trim(), ...(adapter ? { adapter } : {}) };
    const { path } = await post("/api/save", body);
    at("save-note").textContent = `Saved in ${path}`;
    await refresh();
  } catch (error) {
    at("save-error").textContent = error.message;
  }
});

function drawSave({ adapters, can_save: can }) {
  const choice = at("save-what").value;
  at("save-what").replaceChildren(
    ...adapters.map(({ name }) => make("option", { value: `adapter:${name}` }, `adapter ${name}`)),
    make("option", { value: "model" }, "the whole model"));
  if ([...at("save-what").options].some((option) => option.value === choice)) at("save-what").value = choice;
  for (const field of at("save-form").elements) field.disabled = !can;
  if (!can) at("save-note").textContent = "Saving is off: the server was started without a folder to write to (--runs).";
}

listen("state", (now) => {
  drawJournal(now);
  drawAdapters(now.adapters);
  drawSave(now);
  readLayers();
});
addEventListener("place", ({ detail }) => detail === "operate" && state() && readLayers());
showTargets();
