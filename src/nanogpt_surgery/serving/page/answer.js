// An answer as it streams: tokens that can be tinted, read one by one, and taken another way.

import { announce, arrowKeys, at, make, percent, shown } from "./dom.js";

/** Returns how strongly a token is tinted: 0 where it was certain, 1 at a probability of 1/400. */
export const surprise = (probability) =>
  Number.isFinite(probability) ? Math.min(1, -Math.log(Math.max(probability, 1e-9)) / 6) : 0;

const card = at("alternatives");
let open = null; // {token, pinned}
let hiding;

function place(anchor) {
  card.hidden = false;
  const box = anchor.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 8));
  const below = box.bottom + card.offsetHeight + 8 < innerHeight;
  card.style.left = `${left + scrollX}px`;
  card.style.top = `${(below ? box.bottom + 4 : Math.max(8, box.top - card.offsetHeight - 4)) + scrollY}px`;
}

export function hideAlternatives() {
  clearTimeout(hiding);
  card.hidden = true;
  open?.token.removeAttribute("aria-expanded");
  open = null;
}

function hideSoon() {
  clearTimeout(hiding);
  if (open && !open.pinned) hiding = setTimeout(hideAlternatives, 250);
}

function showAlternatives(element, token, choose, pinned = false) {
  hideAlternatives();
  open = { token: element, pinned };
  element.setAttribute("aria-expanded", "true");
  const options = token.likeliest ?? [];
  card.replaceChildren(
    make("p", {}, make("code", {}, shown(token.text)), ` ${percent(token.probability, 1)}`),
    make("ul", {}, ...options.map((one) =>
      make("li", {},
        make("button", {
          type: "button", "--p": one.probability, class: one.id === token.id ? "taken" : null,
          "aria-label": `Go on with ${one.text}, ${percent(one.probability, 1)}`,
          click: () => {
            hideAlternatives();
            choose(one);
          },
        }, make("code", {}, shown(one.text)), make("span", {}, percent(one.probability, 1)))))),
    make("p", { class: "soft" }, options.length ? "Choose one to go on from there." : "No alternatives came with it."),
  );
  place(element);
  if (pinned) card.querySelector("button")?.focus();
}

card.addEventListener("mouseenter", () => clearTimeout(hiding));
card.addEventListener("mouseleave", hideSoon);
card.addEventListener("focusout", (event) => {
  if (event.relatedTarget && !card.contains(event.relatedTarget)) hideAlternatives();
});
card.addEventListener("keydown", (event) => {
  const buttons = [...card.querySelectorAll("button")];
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const next = buttons.indexOf(document.activeElement) + step;
  buttons[Math.min(Math.max(next, 0), buttons.length - 1)]?.focus();
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !open) return;
  const { token } = open;
  hideAlternatives();
  token.focus();
  hideAlternatives(); // focus had opened it
});
addEventListener("resize", hideAlternatives);
document.addEventListener("click", (event) => {
  if (open && !card.contains(event.target) && !event.target.closest(".token")) hideAlternatives();
});

/** An answer in an element; `goOn(index, token)` is called where another token is chosen. */
export class Answer {
  constructor(element, name, goOn) {
    this.element = element;
    this.name = name;
    this.goOn = goOn;
    this.tokens = [];
    arrowKeys(element, ".token");
  }

  clear(prompt) {
    hideAlternatives();
    this.tokens = [];
    this.unsaid = "";
    this.element.replaceChildren(make("span", { class: "prompt" }, prompt));
  }

  /** Keeps the first `length` tokens. */
  cut(length) {
    hideAlternatives();
    this.tokens.length = length;
    for (const one of [...this.element.querySelectorAll(".token")].slice(length)) one.remove();
  }

  get ids() {
    return this.tokens.map((token) => token.id);
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  add(token) {
    const index = this.tokens.push(token) - 1;
    const show = (pinned) =>
      showAlternatives(element, token, (other) => this.goOn(index, other), pinned);
    const element = make("span", {
      class: "token", role: "button", tabindex: index ? -1 : 0, "aria-haspopup": "dialog",
      "--surprise": surprise(token.probability),
      mouseenter: () => open?.pinned || show(false),
      mouseleave: hideSoon,
      focus: () => show(false),
      blur: (event) => card.contains(event.relatedTarget) || hideSoon(),
      click: () => show(true),
      keydown: (event) => {
        if (event.key !== "Enter" && event.key !== " " && event.key !== "ArrowDown") return;
        event.preventDefault();
        show(true);
      },
    }, token.text);
    this.element.append(element);
    this.#say(token.text);
  }

  /** Reads aloud a sentence at a time: a token at a time could not be listened to. */
  #say(text) {
    this.unsaid += text;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => this.unsaid.lastIndexOf(mark)));
    if (end > 20) {
      announce(`${this.name}: ${this.unsaid.slice(0, end + 1)}`);
      this.unsaid = this.unsaid.slice(end + 1);
    }
  }

  end() {
    if (this.unsaid.trim()) announce(`${this.name}: ${this.unsaid}`);
    this.unsaid = "";
  }
}
