// Making and finding elements, and writing numbers. Whatever a model or a person wrote goes through
// textContent or an attribute, never through HTML.

export const at = (id) => document.getElementById(id);

/** Makes an element; `attributes` with a function become listeners, and children may be texts. */
export function make(kind, attributes = {}, ...children) {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== undefined && child !== null));
  return element;
}

/** Returns a token's text so that blanks and line ends are seen. */
export const shown = (text) =>
  text === "" ? "∅" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");

export const short = (hash) => (hash ? hash.slice(0, 8) : "");

export function percent(share, digits = 0) {
  if (!Number.isFinite(share)) return "–";
  if (share > 0 && 100 * share < 0.5 * 10 ** -digits) return `<${10 ** -digits} %`;
  return `${(100 * share).toFixed(digits)} %`;
}

/** Returns a count as 1.2 k, 134.5 M, 1.3 G. */
export function count(number) {
  if (!Number.isFinite(number)) return "–";
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]])
    if (Math.abs(number) >= size) return `${(number / size).toPrecision(3)} ${unit}`;
  return String(number);
}

export function figure(number, digits = 3) {
  return Number.isFinite(number) ? number.toFixed(digits) : "–";
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** Says something to people who hear the page. */
export function announce(text) {
  at("announcer").textContent = text;
}

/** Lets arrow keys, Home and End go between children, of which one alone takes the Tab key. */
export function arrowKeys(group, selector) {
  group.addEventListener("focusin", (event) => {
    const reached = event.target.closest(selector);
    if (!reached) return;
    for (const one of group.querySelectorAll(`${selector}[tabindex="0"]`)) one.tabIndex = -1;
    reached.tabIndex = 0;
  });
  group.addEventListener("keydown", (event) => {
    const all = [...group.querySelectorAll(selector)];
    const here = all.indexOf(event.target.closest(selector));
    const last = all.length - 1;
    const goal = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: last }[event.key];
    if (here < 0 || goal === undefined) return;
    event.preventDefault();
    all[Math.min(Math.max(goal, 0), last)].focus();
  });
}

/** Keeps what a field holds for as long as the tab is open. */
export function remember(...fields) {
  for (const field of fields) {
    const kept = sessionStorage.getItem(field.id);
    if (kept !== null) {
      if (field.type === "checkbox") field.checked = kept === "true";
      else field.value = kept;
    }
    field.addEventListener("input", () =>
      sessionStorage.setItem(field.id, field.type === "checkbox" ? field.checked : field.value),
    );
  }
}

/** Returns a function that calls `action` once its own calls have paused for a moment. */
export function settled(action, milliseconds = 350) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, milliseconds);
  };
}

/** Returns a report of the library, {title, rows, summary}, as a heading, a table and pairs. */
export function report(given) {
  const box = make("div", { class: "report" });
  if (given.title) box.append(make("p", { class: "report-title" }, given.title));
  const written = (value) =>
    typeof value === "number"
      ? Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(4)
      : value === null || value === undefined ? "–"
      : typeof value === "object" ? JSON.stringify(value) : String(value);
  const pairs = given.summary ?? {};
  if (Object.keys(pairs).length) {
    const list = make("dl", { class: "pairs" });
    for (const [name, value] of Object.entries(pairs))
      list.append(make("div", {}, make("dt", {}, name.replaceAll("_", " ")), make("dd", {}, written(value))));
    box.append(list);
  }
  const rows = given.rows ?? [];
  if (rows.length) {
    const names = Object.keys(rows[0]);
    const table = make(
      "table", {},
      make("thead", {}, make("tr", {}, ...names.map((n) => make("th", { scope: "col" }, n.replaceAll("_", " "))))),
      make("tbody", {}, ...rows.map((row) =>
        make("tr", {}, ...names.map((n) =>
          make("td", { class: typeof row[n] === "number" ? "number" : null }, written(row[n])))))),
    );
    box.append(make("details", { open: rows.length <= 6 }, make("summary", {}, `${rows.length} rows`),
      make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Rows" }, table)));
  }
  return box;
}
