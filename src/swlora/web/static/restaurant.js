// The restaurant form: its facts as the model is given them, and what people wrote about them.

import { postJson, Refused } from "./events.js";

const PREFIX = "field.";
const PAUSE_MS = 200;

/** Show prompt and references as fields change; return {prompt} that gives the present one. */
export function followMeaning(form) {
  const meaning = form.querySelector("[data-meaning]");
  let timer = 0;
  let number = 0;

  form.addEventListener("input", (event) => {
    if (!event.target.name?.startsWith(PREFIX)) return;
    clearTimeout(timer);
    timer = setTimeout(() => refresh().catch(tell), PAUSE_MS);
  });

  async function refresh() {
    const mine = ++number;
    const found = await postJson("/api/restaurant", { fields: fieldsOf(form) });
    if (mine === number) {
      meaning.textContent = found.prompt;
      showReferences(found.references);
    }
    return found.prompt;
  }

  function tell(error) {
    meaning.textContent = error instanceof Refused ? error.message : "the server cannot be reached";
    showReferences([]);
  }

  return { prompt: refresh };
}

function fieldsOf(form) {
  const fields = {};
  for (const [name, value] of new FormData(form)) {
    if (name.startsWith(PREFIX)) fields[name.slice(PREFIX.length)] = value;
  }
  return fields;
}

function showReferences(texts) {
  const list = document.querySelector("[data-references]");
  if (!list || !texts) return;
  list.replaceChildren(
    ...texts.map((text) => {
      const item = document.createElement("li");
      item.textContent = text;
      return item;
    }),
  );
  document.querySelector("[data-no-references]").hidden = texts.length > 0;
}
