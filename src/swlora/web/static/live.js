// A part of a page that the server draws anew when something has changed.

const SHARE = 0.05; // of the time may be spent on asking

/** Ask every `data-every` seconds while the page is looked at, until the server says it is over. */
export async function keepUpToDate(part) {
  const everyMs = 1000 * Number(part.dataset.every);
  let pauseMs = everyMs;
  for (;;) {
    await pause(pauseMs);
    await isSeen();
    const startMs = performance.now();
    const isOver = await refresh(part).catch(() => false); // the server may be back later
    if (isOver) break;
    pauseMs = Math.max(everyMs, (performance.now() - startMs) / SHARE);
  }
  const said = document.querySelector("[data-over]");
  if (said) said.textContent = "It is over.";
}

async function refresh(part) {
  const url = `${part.dataset.live}&seen=${part.dataset.version}`;
  const response = await fetch(url, { cache: "no-store" });
  if (response.status === 200) {
    const text = await response.text();
    part.dataset.version = response.headers.get("x-version");
    replace(part, text);
  }
  if (response.headers.has("x-reload")) location.reload();
  return response.headers.has("x-over");
}

/** Put the new part in place; whoever stands on a link stays on it. */
function replace(part, text) {
  const focused = part.contains(document.activeElement) && document.activeElement;
  const href = focused && focused.getAttribute("href");
  part.innerHTML = text;
  if (!href) return;
  const again = [...part.querySelectorAll("a")].find((link) => link.getAttribute("href") === href);
  again?.focus({ preventScroll: true });
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function isSeen() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    document.addEventListener("visibilitychange", resolve, { once: true });
  });
}
