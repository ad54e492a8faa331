// Requests to the page's own server. Whatever goes wrong ends in a Fault whose message can be shown as it is.

const PATIENCE = [3, 6, 12]; // seconds before a busy page is asked again
const WORDS = {
  401: "Your session has ended. Load the page anew and give the key.",
  413: "The file is too large.",
  429: "The page is busy. Try again in a few seconds.",
  503: "The page is busy: too many people are asking at once. Try again in a few seconds.",
};

const UNREACHED = "The page's own server does not answer. Check that it still runs and that you are connected, then try again.";
const UNSENT = "The image could not be sent: the connection broke off. Check that the page still runs and that you are connected, then try again.";

export class Fault extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const stopped = () => new DOMException("aborted", "AbortError");

// Ends at once when nobody waits any more: what is stopped must be over before the next begins.
const pause = (seconds, signal) =>
  new Promise((resolve) => {
    setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", resolve, { once: true });
  });

// A response with status 200. A busy page is asked again a few times; `waiting` is told why nothing happens meanwhile.
async function fetched(path, options, waiting, unreached = UNREACHED) {
  for (let attempt = 0; ; attempt++) {
    let response;
    try {
      response = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
    } catch (fault) {
      if (options.signal?.aborted) throw fault;
      throw new Fault(unreached);
    }
    if (response.ok) return response;
    const told = await response.json().catch(() => ({}));
    const busy = response.status === 503 || response.status === 429;
    if (!busy || attempt >= PATIENCE.length) {
      const words = told.error || WORDS[response.status] || `The page could not do this (HTTP ${response.status}).`;
      throw new Fault(words, response.status);
    }
    waiting?.("The page is busy. You are in the queue and need do nothing.");
    await pause(PATIENCE[attempt] * (0.5 + Math.random()), options.signal);
    if (options.signal?.aborted) throw stopped();
  }
}

const json = (value) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) });

// What the server answers to `value`, or to a plain GET.
export async function asked(path, value) {
  return (await fetched(path, value === undefined ? {} : json(value))).json();
}

export async function sent(path, file, signal, waiting) {
  const options = { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file, signal };
  return (await fetched(path, options, waiting, UNSENT)).json();
}

export async function picture(path, signal) {
  return (await fetched(path, { signal })).blob();
}

// Events, one a line of JSON, as they come.
export async function* events(path, value, signal, waiting) {
  const response = await fetched(path, { ...json(value), signal }, waiting);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value: piece, done } = await reader.read();
      const lines = (rest + (piece ?? "")).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        yield JSON.parse(line);
        if (signal?.aborted) throw stopped(); // what came with it is of no use to anybody either
      }
      if (done) return;
    }
  } catch (fault) {
    if (signal?.aborted) throw fault;
    throw new Fault("The connection to the page broke off. Check that it still runs, then try again.");
  }
}
