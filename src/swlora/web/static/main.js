// What the pages can do besides what they are: stream texts, keep lists and curves up to date.

import { setUpChat } from "./chat.js";
import { keepUpToDate } from "./live.js";
import { followMeaning } from "./restaurant.js";
import { setUpWriter } from "./writer.js";

for (const form of document.querySelectorAll("[data-writer]")) {
  const meaning = form.hasAttribute("data-restaurant") ? followMeaning(form) : null;
  setUpWriter(form, meaning);
}
for (const form of document.querySelectorAll("[data-chat]")) setUpChat(form);
for (const part of document.querySelectorAll("[data-live]")) keepUpToDate(part);
