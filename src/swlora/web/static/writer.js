// A form whose texts stream into panes. The form's own fields are what is sent.

import { postForEvents, Refused } from "./events.js";
import { Pane } from "./pane.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "repetition_penalty", "seed"];

/** Stream instead of reloading; `meaning`, where given, makes the prompt. */
export function setUpWriter(form, meaning) {
  const panes = [...document.querySelectorAll("[data-pane]")].map((node) => new Pane(node));
  const submit = form.querySelector("[data-submit]");
  const stop = form.querySelector("[data-stop]");
  const problem = form.querySelector("[data-problem]");
  const status = document.querySelector("[data-status]");
  let request = null;

  showValues(form);
  if (form.elements.beside) {
    const choose = () => nameModels(form, panes);
    form.elements.model.addEventListener("change", choose);
    form.elements.beside.addEventListener("change", choose);
    choose(); // a browser that comes back fills in what was chosen before
  } else {
    form.elements.model.addEventListener("change", () => {
      for (const pane of panes) pane.name = form.elements.model.value;
    });
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!request) run();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") request?.abort();
  });
  stop.addEventListener("click", () => request?.abort());

  async function run() {
    const mine = new AbortController();
    request = mine;
    busy(true);
    const sides = sidesOf(form);
    const used = panes.slice(0, sides.length);
    try {
      const prompt = meaning ? await meaning.prompt() : form.elements.prompt.value;
      const body = bodyOf(form, prompt, sides);
      panes.forEach((pane, side) => {
        const shown = meaning || body.messages ? "" : before(form, prompt, sides[side]?.model);
        pane.begin(shown, side < sides.length);
      });
      showSeed(form, body.seed);
      status.textContent = "Writing.";
      for await (const news of postForEvents("/api/generate", body, mine.signal)) {
        if (news.side !== undefined) used[news.side].take(news);
      }
    } catch (error) {
      if (error.name !== "AbortError") say(error);
    } finally {
      for (const pane of used) pane.end(mine.signal.aborted ? "stopped" : "cut off");
      status.textContent = used.map((pane) => pane.announcement).join(" ");
      busy(false);
      request = null;
    }
  }

  function busy(is) {
    stop.disabled = !is;
    submit.disabled = is;
    if (is) problem.hidden = true;
    else if (document.activeElement === stop || document.activeElement === document.body) submit.focus();
  }

  function say(error) {
    const known = error instanceof Refused;
    problem.textContent = known ? error.message : "The connection to the server was lost. Is it still running?";
    problem.hidden = false;
  }
}

function sidesOf(form) {
  const model = form.elements.model.value;
  if (form.dataset.writer === "weights") {
    const zeroed = new FormData(form).getAll("zeroed");
    return zeroed.length ? [{ model }, { model, zeroed }] : [{ model }];
  }
  const beside = form.elements.beside.value;
  return beside ? [{ model }, { model: beside }] : [{ model }];
}

function bodyOf(form, prompt, sides) {
  const body = { sides, seed: Math.floor(Math.random() * 2 ** 31) };
  for (const name of NUMBERS) {
    const text = form.elements[name].value.trim();
    if (text) body[name] = Number(text);
  }
  if (form.elements.mode?.value === "chat") body.messages = [{ role: "user", content: prompt }];
  else body.prompt = prompt;
  return body;
}

/** Return what stands before a continuation: the prompt, and what the adapter puts behind it. */
function before(form, prompt, model) {
  const option = [...form.elements.model.options].find((one) => one.value === model);
  const separator = option?.dataset.separator ?? "";
  return prompt.endsWith(separator) ? prompt : prompt + separator;
}

function showSeed(form, seed) {
  const place = form.querySelector("[data-seed]");
  place.querySelector("b").textContent = seed;
  place.hidden = false;
}

function nameModels(form, panes) {
  const names = [form.elements.model.value, form.elements.beside.value];
  panes.forEach((pane, side) => {
    pane.isShown = Boolean(names[side]);
    if (names[side]) pane.name = names[side];
  });
}

function showValues(form) {
  for (const output of form.querySelectorAll("output[for]")) {
    const input = form.elements[output.htmlFor.value];
    const show = () => (output.value = input.value);
    input.addEventListener("input", show);
    show();
  }
}
