// Train: data and what of it is trained on, a plan, and the run as it goes.

import { announce, at, duration, figure, make, remember, report } from "./dom.js";
import { get, listen, post, refresh, state } from "./server.js";

let data = null; // {kind, content | path, name}
let open = null; // the name of the run that is shown
let metrics = [];
let samples = [];
let chart = null;

remember(...["name", "steps", "rate", "batch", "block", "rank", "targets", "every", "prompt"].map((name) => at(`train-${name}`)));

// Data

const kindOf = (name) => (/\.jsonl?$/i.test(name) ? "jsonl" : "text");

async function take(file) {
  if (!file) return;
  at("path").value = "";
  data = { kind: kindOf(file.name), name: file.name, content: await file.text() };
  await preview();
}

async function preview() {
  at("train-plan").replaceChildren();
  at("data-note").textContent = `Reading ${data.name} …`;
  at("preview").hidden = true;
  try {
    const { examples, count, tokens, note } = await post("/api/train/preview", data);
    const counts = [count === undefined ? "" : `${count.toLocaleString("en")} ${count === 1 ? "example" : "examples"}`,
      tokens === undefined ? "" : `${tokens.toLocaleString("en")} tokens`, note].filter(Boolean);
    at("data-note").textContent = `${data.name}: ${counts.join(", ")}. What is coloured is trained on.`;
    at("preview").replaceChildren(...examples.map(({ pieces }) =>
      make("p", {}, ...pieces.map(({ text, answer }) => make(answer ? "mark" : "span", {}, text)))));
    at("preview").hidden = false;
  } catch (error) {
    at("data-note").replaceChildren(make("span", { class: "wrong" }, error.message));
    data = null;
  }
  offer();
}

at("file").addEventListener("change", () => take(at("file").files[0]));
const drop = at("drop");
for (const kind of ["dragenter", "dragover"])
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault()); // a miss opens no file
at("path").addEventListener("change", () => {
  const path = at("path").value.trim();
  if (!path) return;
  data = { kind: kindOf(path), name: path, path };
  preview();
});

// The plan, and the start

function question() {
  const number = (id) => +at(id).value;
  const prompt = at("train-prompt").value;
  return {
    kind: data.kind, ...(data.path ? { path: data.path } : { content: data.content }),
    name: at("train-name").value.trim(), targets: at("train-targets").value.split(",").map((one) => one.trim()).filter(Boolean),
    rank: number("train-rank"), max_steps: number("train-steps"), learning_rate: number("train-rate"),
    batch_size: number("train-batch"), evaluate_every: number("train-every"),
    ...(at("train-block").value ? { block_size: number("train-block") } : {}), ...(prompt ? { sample_prompt: prompt } : {}),
  };
}

async function carryOut(action) {
  at("train-error").textContent = "";
  try {
    return await action();
  } catch (error) {
    at("train-error").textContent = error.message;
    return null;
  }
}

at("train-plan-button").addEventListener("click", () => carryOut(async () => {
  at("train-plan").replaceChildren(make("p", { class: "soft" }, "Planning: a step is tried out in a process of its own …"));
  try {
    at("train-plan").replaceChildren(report(await post("/api/train/plan", question())));
  } catch (error) {
    at("train-plan").replaceChildren();
    throw error;
  }
}));
at("train-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (at("train-start").disabled) return;
  await carryOut(async () => {
    const { run } = await post("/api/train/start", question());
    await show(run).catch(() => {}); // its folder comes with the first step
    await refresh();
    at("run-title").focus();
  });
});

function offer() {
  const now = state();
  const running = ["running", "stopping"].includes(now?.training?.state);
  at("train-plan-button").disabled = !data || !now?.can_train;
  at("train-start").disabled = !data || !now?.can_train || running;
  at("train-start").textContent = running ? "A training runs" : "Start";
}

// The run

const over = (how) => how === "ended" || how === "failed" || how === "stopped";

for (const action of ["pause", "resume", "stop"])
  at(action).addEventListener("click", async () => {
    at("run-error").textContent = "";
    try {
      await post(`/api/train/${action}`, { name: open });
      await refresh();
      if (at(action).hidden) at("run-title").focus(); // the button is gone, and the focus with it
    } catch (error) {
      at("run-error").textContent = error.message;
    }
  });

/** Opens a run: its figures and samples up to now; what follows comes by events. */
async function show(name) {
  if (open !== name) [metrics, samples] = [[], []];
  open = name;
  at("run-title").textContent = name;
  at("run-error").textContent = "";
  const run = await get(`/api/runs/${encodeURIComponent(name)}`);
  if (open !== name) return;
  metrics = run.metrics;
  samples = run.samples;
  const newest = metrics.at(-1) ?? {};
  drawRun({ ...newest, max_steps: run.max_steps ?? run.config?.max_steps, state: run.state, ...run.training });
  drawSamples();
}

function drawRun(now) {
  const mine = state()?.training?.run === open;
  const how = now.state ?? "running";
  at("run-progress").hidden = !now.max_steps;
  at("run-progress").max = now.max_steps || 1;
  at("run-progress").value = now.step ?? 0;
  at("pause").hidden = !mine || how !== "running";
  at("resume").hidden = how !== "paused" && !(how === "stopped" && state()?.can_train);
  at("stop").hidden = !mine || (how !== "running" && how !== "paused");
  const evaluated = metrics.filter((one) => Number.isFinite(one.validation_loss)).at(-1);
  const figures = {
    State: how, Step: now.max_steps ? `${now.step ?? 0} of ${now.max_steps}` : now.step ?? "–", Loss: figure(now.loss),
    "Validation loss": figure(evaluated?.validation_loss), "Tokens a second": Number.isFinite(now.tokens_per_second) ? Math.round(now.tokens_per_second).toLocaleString("en") : "–",
    "Time left": over(how) ? "–" : duration(now.seconds_left),
  };
  at("run-empty").hidden = Boolean(metrics.length) || how !== "running";
  at("run-empty").textContent = "It opens the model and evaluates it before the first step.";
  at("figures").replaceChildren(...Object.entries(figures).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  if (now.error) at("run-error").textContent = now.error;
  drawChart();
}

function drawChart() {
  const box = at("chart");
  const steps = metrics.map((one) => one.step);
  const values = [steps, metrics.map((one) => one.loss ?? null), metrics.map((one) => one.validation_loss ?? null)];
  const newest = metrics.findLast((one) => Number.isFinite(one.loss));
  box.setAttribute("aria-label", newest ? `Loss by step; ${figure(newest.loss)} at step ${newest.step}` : "Loss by step");
  if (!steps.length) {
    chart?.destroy();
    chart = null;
    return;
  }
  if (chart) return chart.setData(values);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 }, font: "12px system-ui" };
  const series = (label, stroke, more) => ({ label, stroke, width: 2, spanGaps: true, value: (_, value) => figure(value), ...more });
  chart = new uPlot({
    width: Math.max(box.clientWidth, 200), height: 240, scales: { x: { time: false } }, axes: [axis, { ...axis, size: 44 }],
    series: [{ label: "Step" }, series("Loss", colour("--accent"), { points: { show: false } }),
      series("Validation loss", colour("--second"), { dash: [6, 4], points: { show: true, size: 6 } })],
  }, values, box);
}

new ResizeObserver(() => chart?.setSize({ width: Math.max(at("chart").clientWidth, 200), height: 240 })).observe(at("chart"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  chart?.destroy();
  chart = null;
  if (metrics.length) drawChart();
});

function drawSamples() {
  at("samples-card").hidden = !samples.length;
  at("samples").replaceChildren(...[...samples].reverse().map(({ step, prompt, text, base_text: base }) =>
    make("section", { class: "sample", "aria-label": `Sample at step ${step}` },
      make("h3", {}, `Step ${step}`),
      make("div", { class: "sides" },
        make("div", {}, make("p", { class: "soft" }, "with the adapter"), make("p", { class: "text" }, make("span", { class: "prompt" }, prompt), text)),
        base === undefined || base === null ? "" : make("div", {}, make("p", { class: "soft" }, "base"), make("p", { class: "text" }, make("span", { class: "prompt" }, prompt), base))))));
}

let told = ""; // what was said last

/** Says how a run goes to people who hear the page: its state, and each evaluation. */
function tellAloud({ run, state: how, step, validation_loss: loss }) {
  const evaluated = Number.isFinite(loss) ? `, step ${step}, validation loss ${figure(loss)}` : "";
  const now = `${run}: ${how}${evaluated}`;
  if (now !== told && (evaluated || !told.startsWith(`${run}: ${how}`))) announce((told = now));
}

listen("training", (now) => {
  if (!now?.run) return;
  if (open === null) return void show(now.run).catch(() => {});
  if (open !== now.run) return;
  tellAloud(now);
  if (Number.isInteger(now.step) && (Number.isFinite(now.loss) || Number.isFinite(now.validation_loss))) {
    const known = metrics.find((one) => one.step === now.step);
    if (known) Object.assign(known, Object.fromEntries(Object.entries(now).filter(([, value]) => value !== null)));
    else metrics.push(now);
    metrics.sort((a, b) => a.step - b.step);
  }
  for (const one of now.samples ?? []) if (!samples.some((had) => had.step === one.step && had.prompt === one.prompt)) samples.push(one);
  drawRun(now);
  drawSamples();
});

// Runs

async function readRuns() {
  if (at("train").hidden) return;
  try {
    const { runs } = await get("/api/runs");
    at("runs").replaceChildren(...runs.map((run) => {
      const notes = [run.state, run.max_steps ? `${run.step ?? 0} of ${run.max_steps}` : "", Number.isFinite(run.validation_loss) ? `validation ${figure(run.validation_loss)}` : ""];
      return make("li", {}, make("button", { type: "button", "aria-current": run.name === open ? "true" : null, click: () => show(run.name).then(readRuns) },
        make("b", {}, run.name), make("span", { class: "soft" }, notes.filter(Boolean).join(" · "))));
    }));
    if (!runs.length) at("runs").append(make("li", { class: "soft" }, "None so far."));
  } catch {
    // Without a folder of runs there is nothing to list, and the page has said so.
  }
}

listen("state", (now) => {
  at("train-off").hidden = now.can_train;
  at("train-off").textContent = now.can_train ? "" : "Training is off: the server was started without a folder for runs (--runs FOLDER).";
  if (now.training) {
    if (open === null) show(now.training.run).catch(() => {});
    else if (open === now.training.run) drawRun(now.training);
  }
  offer();
  readRuns();
});
listen("connection", ({ on }) => on && open && show(open).catch(() => {}));
addEventListener("place", ({ detail }) => detail === "train" && readRuns());
// A run of another process is not told by events: it is read again while it is looked at.
setInterval(() => {
  if (at("train").hidden || document.hidden) return;
  if (open && state()?.training?.run !== open) show(open).catch(() => {});
  readRuns();
}, 5000);
