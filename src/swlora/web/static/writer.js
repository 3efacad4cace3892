// A form whose texts stream into panes. The form's own fields are what is sent.

import { postForEvents } from "./events.js";
import { Pane } from "./pane.js";
import { nameModels, settingsOf, Work } from "./work.js";

/** Stream instead of reloading; `meaning`, where given, makes the prompt. */
export function setUpWriter(form, meaning) {
  const panes = [...document.querySelectorAll("[data-pane]")].map((node) => new Pane(node));
  const work = new Work(form);
  const choose = () => show(form, panes);

  form.addEventListener("change", choose);
  choose(); // a browser that comes back fills in what was chosen before
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!work.isBusy) write();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });

  async function write() {
    const sides = sidesOf(form);
    const used = panes.slice(0, sides.length);
    await work.run(used, async (signal) => {
      const prompt = meaning ? await meaning.prompt() : form.elements.prompt.value;
      panes.forEach((pane, side) => {
        const shown = meaning ? "" : before(form, prompt, sides[side]?.model);
        pane.begin(shown, side < sides.length);
      });
      const body = { ...settingsOf(form), sides, prompt };
      for await (const news of postForEvents("/api/generate", body, signal)) {
        if (news.side !== undefined) used[news.side].take(news);
      }
    });
  }
}

/** Show the panes that will be written into. */
function show(form, panes) {
  if (form.dataset.writer !== "weights") {
    nameModels(form, panes);
    return;
  }
  const isTicked = new FormData(form).has("zeroed");
  for (const pane of panes) pane.name = form.elements.model.value;
  panes[1].isShown = isTicked;
  form.querySelector("[data-none-ticked]").hidden = isTicked;
}

function sidesOf(form) {
  const model = form.elements.model.value;
  if (form.dataset.writer === "weights") {
    const zeroed = new FormData(form).getAll("zeroed");
    return zeroed.length ? [{ model }, { model, zeroed }] : [{ model }];
  }
  const other = form.elements.compare.value;
  return other ? [{ model }, { model: other }] : [{ model }];
}

/** Return what stands before a continuation: the prompt, and what the adapter puts behind it. */
function before(form, prompt, model) {
  const option = [...form.elements.model.options].find((one) => one.value === model);
  const separator = option?.dataset.separator ?? "";
  return prompt.endsWith(separator) ? prompt : prompt + separator;
}
