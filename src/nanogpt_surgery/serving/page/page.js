// The page's frame: the key, the four places, the model's name, and whether the line stands.

import { announce, at, count, make, short } from "./dom.js";
import { listen, onKeyWanted, reconnect, refresh, useKey, watch } from "./server.js";
import "./talk.js";
import "./look.js";
import "./operate.js";
import "./train.js";

const places = ["talk", "look", "operate", "train"];

function show() {
  const place = places.includes(location.hash.slice(1)) ? location.hash.slice(1) : "talk";
  for (const one of places) at(one).hidden = one !== place;
  for (const link of at("nav").children) {
    if (link.hash === `#${place}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${place[0].toUpperCase()}${place.slice(1)} – NanoGPT-Surgery`;
  dispatchEvent(new CustomEvent("place", { detail: place }));
}
addEventListener("hashchange", () => {
  show();
  at("place").focus({ preventScroll: true }); // the next Tab begins in the place, not above it
  scrollTo(0, 0);
});
at("skip").addEventListener("click", (event) => {
  event.preventDefault();
  at("place").focus();
});
show();

listen("state", ({ model }) => {
  at("key-form").hidden = true;
  at("place").hidden = false;
  at("model").replaceChildren(
    make("b", {}, model.name), " ",
    make("span", { class: "wide-only" }, `${count(model.parameters)} · ${model.dtype} · `),
    make("code", { title: `sha256 of the weights: ${model.hash}` }, short(model.hash)),
  );
});

let lost = false;
listen("connection", ({ on }) => {
  const bar = at("connection");
  document.body.classList.toggle("lost", !on);
  if (on) {
    bar.replaceChildren();
    if (lost) announce("Connected again.");
  } else if (!lost && at("key-form").hidden) {
    bar.replaceChildren(
      make("span", {}, "The connection to the server is lost. Trying again; nothing on this page is gone."),
      make("button", { type: "button", click: reconnect }, "Try now"),
    );
  }
  lost = !on;
});

onKeyWanted((wasWrong) => {
  at("place").hidden = true;
  at("key-form").hidden = false;
  at("connection").replaceChildren();
  at("key-wrong").textContent = wasWrong ? "That key is not the server’s." : "";
  at("key").focus();
});
at("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey(at("key").value.trim());
  await refresh().then(reconnect, () => {});
});

watch();
