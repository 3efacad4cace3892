// One text on the page: streams in, counts its tokens, says how it ended.

const ENDS = { stop: "ended by itself", length: "full length" };
const SPOKEN = 700; // characters that a screen reader is given at once; the rest is in the pane

export class Pane {
  #node;
  #text;
  #parts;
  #prompt = "";
  #startMs = 0;
  #tokens = 0;

  constructor(node) {
    this.#node = node;
    const part = (name) => node.querySelector(`[data-${name}]`);
    this.#parts = {
      name: part("name"),
      stats: part("stats"),
      scroller: part("text"),
      prompt: part("prompt"),
      written: part("written"),
    };
  }

  set name(value) {
    this.#parts.name.textContent = value;
  }

  set isShown(value) {
    this.#node.hidden = !value;
  }

  /** The text that was written last. */
  get text() {
    return this.#text.data;
  }

  /** Say nothing of the last text any more. */
  forget() {
    this.#parts.stats.textContent = "";
  }

  /** Write the next text into another place of the pane. */
  writeInto(place) {
    this.#parts.written = place;
  }

  /** Make room for a new text. */
  begin(prompt, isUsed) {
    this.#prompt = isUsed ? prompt : "";
    if (this.#parts.prompt) this.#parts.prompt.textContent = this.#prompt;
    this.#text = document.createTextNode("");
    this.#parts.written.replaceChildren(this.#text);
    this.#parts.stats.textContent = isUsed ? "waiting" : "";
    this.#startMs = performance.now();
    this.#tokens = 0;
    if (isUsed) this.#node.setAttribute("aria-busy", "true");
  }

  /** Add what is new: text, and at the end the reason of it. */
  take({ text, tokens, end }) {
    if (text) this.#append(text);
    this.#tokens = end?.tokens ?? tokens;
    const seconds = end?.seconds ?? (performance.now() - this.#startMs) / 1000;
    this.#show(seconds, "");
    if (!end) return;
    if (end.error) this.#refuse(end.error);
    else this.#show(seconds, ENDS[end.reason] ?? end.reason);
    this.#node.removeAttribute("aria-busy");
  }

  /** End a text that nothing more is heard of. */
  end(how) {
    if (!this.#node.hasAttribute("aria-busy")) return;
    this.#node.removeAttribute("aria-busy");
    if (this.#tokens || how === "stopped") this.#show((performance.now() - this.#startMs) / 1000, how);
    else this.#parts.stats.textContent = "";
  }

  get announcement() {
    const name = this.#parts.name.textContent;
    const text = this.#parts.written.textContent;
    const spoken = text.length > SPOKEN ? `${text.slice(0, SPOKEN)} …` : text;
    return `${name}: ${spoken} (${this.#parts.stats.textContent})`;
  }

  #append(text) {
    const scroller = this.#parts.scroller;
    const room = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
    const isFirst = !this.#text.length && !this.#prompt;
    this.#text.appendData(isFirst ? text.trimStart() : text);
    if (room < 40) scroller.scrollTop = scroller.scrollHeight;
  }

  #show(seconds, how) {
    const rate = this.#tokens / Math.max(seconds, 1e-3);
    const said = [`${this.#tokens} ${this.#tokens === 1 ? "token" : "tokens"}`, `${rate.toFixed(1)} tokens/s`];
    if (how) said.push(how);
    this.#parts.stats.textContent = said.join(" · ");
  }

  #refuse(message) {
    const said = document.createElement("span");
    said.className = "refused";
    said.textContent = message;
    this.#parts.written.append(said);
  }
}
