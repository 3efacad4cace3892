// The chat: its turns are kept here, in a field of the form, and sent whole with every message.

import { postForEvents } from "./events.js";
import { Pane } from "./pane.js";
import { nameModels, settingsOf, Work } from "./work.js";

/** Stream the answers instead of reloading. */
export function setUpChat(form) {
  const { history, message, system } = form.elements;
  const talks = [...document.querySelectorAll("[data-pane]")].map((node) => new Talk(node));
  const panes = talks.map((talk) => talk.pane);
  const work = new Work(form);
  let turns = JSON.parse(history.value);

  form.addEventListener("change", () => nameModels(form, panes));
  nameModels(form, panes);
  talks.forEach((talk) => talk.toEnd());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const action = event.submitter?.value ?? "send";
    if (work.isBusy) return;
    if (action === "reset") {
      keep([]);
      talks.forEach((talk, side) => talk.show(turns, side));
      panes.forEach((pane) => pane.forget());
      message.focus();
    } else if (action === "regenerate") {
      answer(turns.at(-1).user, turns.slice(0, -1));
    } else if (message.value.trim()) {
      const text = message.value.trim();
      message.value = "";
      answer(text, turns);
    }
  });
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!work.isBusy) form.requestSubmit(form.querySelector("[data-submit]"));
  });

  /** Write what every model answers to `text` after the turns before it. */
  async function answer(text, before) {
    const names = nameModels(form, panes);
    const used = talks.slice(0, names.length);
    talks.forEach((talk, side) => talk.begin(before, text, side, side < names.length));
    allow(false);
    await work.run(used.map((talk) => talk.pane), (signal) => {
      const settings = settingsOf(form);
      return Promise.all(names.map((model, side) => {
        const messages = messagesOf(before, side, system.value, text);
        return stream({ ...settings, sides: [{ model }], messages }, used[side].pane, signal);
      }));
    });
    const answers = used.map((talk) => talk.pane.text);
    if (answers.some(Boolean)) {
      keep([...before, { user: text, answers }]);
    } else { // refused, or stopped before a word: as if it had not been said
      keep(turns);
      if (before === turns && !message.value) message.value = text;
    }
    talks.forEach((talk, side) => talk.show(turns, side));
  }

  function keep(now) {
    turns = now;
    history.value = JSON.stringify(turns);
    allow(turns.length > 0);
  }

  function allow(is) {
    for (const name of ["regenerate", "reset"]) form.querySelector(`[data-${name}]`).disabled = !is;
  }
}

async function stream(body, pane, signal) {
  for await (const news of postForEvents("/api/generate", body, signal)) {
    if (news.side !== undefined) pane.take(news);
  }
}

/** Return what a model is given: its own chat so far, and what is said now. */
function messagesOf(turns, side, system, text) {
  const said = system.trim() ? [["system", system]] : [];
  for (const turn of turns) said.push(["user", turn.user], ["assistant", answerOf(turn, side)]);
  return [...said, ["user", text]].map(([role, content]) => ({ role, content }));
}

/** Return the answer of a side; one that joined later shares the first's. */
const answerOf = (turn, side) => turn.answers[side] ?? turn.answers[0];

/** One column of the chat. */
class Talk {
  #list;
  #scroller;
  #nothing;

  constructor(node) {
    this.pane = new Pane(node);
    this.#list = node.querySelector("[data-turns]");
    this.#scroller = node.querySelector("[data-text]");
    this.#nothing = node.querySelector("[data-nothing]");
  }

  show(turns, side) {
    const said = turns.flatMap((turn) => [line("user", turn.user), line("model", answerOf(turn, side))]);
    this.#list.replaceChildren(...said);
    this.#nothing.hidden = said.length > 0;
    this.toEnd();
  }

  /** Add what is said now, and room for the answer; a side that is not used waits for none. */
  begin(turns, text, side, isUsed) {
    this.show(turns, side);
    const answer = line("model", "");
    this.#list.append(line("user", text), answer);
    this.#nothing.hidden = true;
    this.pane.writeInto(answer.lastChild);
    this.pane.begin("", isUsed);
    this.toEnd();
  }

  toEnd() {
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }
}

function line(who, text) {
  const item = document.createElement("li");
  item.className = who;
  const parts = { who: who === "user" ? "You" : "Assistant", said: text };
  for (const [name, content] of Object.entries(parts)) {
    const part = document.createElement("span");
    part.className = name;
    part.textContent = content;
    item.append(part);
  }
  return item;
}
