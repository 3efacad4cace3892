// Requests to the API: JSON in, JSON or server-sent events out. Refusals are thrown as Refused.

export class Refused extends Error {}

export async function postJson(url, body, signal) {
  const response = await post(url, body, signal);
  return response.json();
}

/** Yield the data of every event of a stream until it ends. */
export async function* postForEvents(url, body, signal) {
  const response = await post(url, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

async function post(url, body, signal) {
  const response = await fetch(url, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not one of its own messages
  }
  throw new Refused(message);
}
