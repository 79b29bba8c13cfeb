// Lets a model write into a growing text, and waits where the server is busy.

import { write } from "./api.js";
import { wait } from "./dom.js";

const LEAST_WAIT = 1; // seconds

/**
 * Return {text, note} of what a model wrote; a text that was stopped or broke off is kept.
 *
 * `tell` says what goes on, `grown` is called after each growth. Rejects if nothing was written.
 */
export async function receive(body, growth, signal, tell, grown = () => {}) {
  const answer = { text: "", notes: [] };
  try {
    for await (const event of patiently(body, signal, tell)) {
      take(event, answer, growth);
      grown();
    }
  } catch (error) {
    if (!growth.text) throw error;
    answer.notes.push(error.name === "AbortError" ? "stopped" : `broken off: ${error.message}`);
  }
  return { text: answer.text || growth.text, note: answer.notes.join(" · ") };
}

function take(event, answer, growth) {
  if (event.text) growth.add(event.text);
  if (event.whole) answer.text = event.whole;
  if (event.dropped) answer.notes.push(`${event.dropped} left out, so that it fits`);
  if (event.finish === "length") answer.notes.push("cut at the limit of tokens");
}

/** Yield what `write` does, from the first try for which the server has room. */
async function* patiently(body, signal, tell) {
  for (;;) {
    try {
      tell("The model is writing …");
      return yield* write(body, signal);
    } catch (error) {
      if (!error.isBusy) throw error;
      const seconds = error.retryAfter || LEAST_WAIT;
      tell(`The server is busy. Trying again in ${seconds} s …`);
      await wait(seconds, signal);
    }
  }
}
