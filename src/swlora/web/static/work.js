// What every form that writes texts has: one request at a time, its settings, what went wrong.

import { Refused } from "./events.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "repetition_penalty", "seed"];
const LOST = "The connection to the server was lost. Is it still running?";

/** One request at a time, which the button Stop and Escape end. */
export class Work {
  #form;
  #submit;
  #stop;
  #problem;
  #status = document.querySelector("[data-status]");
  #request = null;

  constructor(form) {
    this.#form = form;
    this.#submit = form.querySelector("[data-submit]");
    this.#stop = form.querySelector("[data-stop]");
    this.#problem = form.querySelector("[data-problem]");
    this.#stop.addEventListener("click", () => this.#request?.abort());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#request?.abort();
    });
    showValues(form);
  }

  get isBusy() {
    return this.#request !== null;
  }

  /** Run `write(signal)`, which streams into `panes`; say how it went. */
  async run(panes, write) {
    const mine = new AbortController();
    let stopped = false;
    mine.signal.addEventListener("abort", () => (stopped = true), { once: true });
    this.#request = mine;
    this.#busy(true);
    this.#status.textContent = "Writing.";
    try {
      await write(mine.signal);
    } catch (error) {
      if (error.name !== "AbortError") {
        this.#say(error);
        mine.abort(); // what else was asked for beside it
        stopped = false;
      }
    } finally {
      for (const pane of panes) pane.end(stopped ? "stopped" : "cut off");
      this.#status.textContent = panes.map((pane) => pane.announcement).join(" ");
      this.#request = null;
      this.#busy(false);
    }
  }

  #busy(is) {
    this.#stop.disabled = !is;
    this.#submit.disabled = is;
    if (is) this.#problem.hidden = true;
    const { activeElement } = document;
    if (!is && (activeElement === this.#stop || activeElement === document.body)) {
      (this.#form.elements.message ?? this.#submit).focus();
    }
  }

  #say(error) {
    this.#problem.textContent = error instanceof Refused ? error.message : LOST;
    this.#problem.hidden = false;
  }
}

/** Return the numbers of the form; a seed is drawn, and shown, where none is given. */
export function settingsOf(form) {
  const settings = { seed: Math.floor(Math.random() * 2 ** 31) };
  for (const name of NUMBERS) {
    const text = form.elements[name].value.trim();
    if (text) settings[name] = Number(text);
  }
  const place = form.querySelector("[data-seed]");
  place.querySelector("b").textContent = settings.seed;
  place.hidden = false;
  return settings;
}

/** Show a pane for each model that is chosen, by its name. */
export function nameModels(form, panes) {
  const names = [form.elements.model.value, form.elements.compare.value];
  panes.forEach((pane, side) => {
    pane.isShown = Boolean(names[side]);
    if (names[side]) pane.name = names[side];
  });
  return names.filter(Boolean);
}

function showValues(form) {
  for (const output of form.querySelectorAll("output[for]")) {
    const input = form.elements[output.htmlFor.value];
    const show = () => (output.value = input.value);
    input.addEventListener("input", show);
    show();
  }
}
