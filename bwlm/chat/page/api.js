// The server's protocol: models, a message as it is written, and the surprise of a text.

const TOKEN = "bwlm.token";

/** What the server refused, or that it did not answer. */
export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }

  get isBusy() { return this.status === 429; }
}

export const keepToken = (token) => sessionStorage.setItem(TOKEN, token);

/** Return the models that the server serves. */
export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/**
 * Yield what the model writes: `{at: "end" | "front", text}` for new text, `{whole}` where the whole text is known,
 * `{dropped}` for what was left out of the prompt, `{finish}` at the end.
 */
export async function* write(body, signal) {
  const response = await request("v1/chat/completions", { ...body, stream: true }, signal);
  for await (const chunk of events(response)) {
    if (chunk.dropped) yield { dropped: chunk.dropped };
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    const { prepend, content } = choice.delta ?? {};
    if (prepend) yield { at: "front", text: prepend };
    // a backward text ends with its whole, for clients that know no `prepend`
    if (content) yield body.direction === "backward" ? { whole: content } : { at: "end", text: content };
    if (choice.finish_reason) yield { finish: choice.finish_reason };
  }
}

/** Return text, offsets of its tokens in characters, and their log-probabilities in nats, in reading order. */
export async function score(model, direction, text, signal) {
  const body = { model, direction, prompt: text, max_tokens: 0, echo: true, logprobs: 0 };
  const choice = (await (await request("v1/completions", body, signal)).json()).choices[0];
  return { text: choice.text, offsets: choice.logprobs.text_offset, logprobs: choice.logprobs.token_logprobs };
}

async function request(path, body, signal) {
  let response;
  try {
    response = await fetch(path, { ...(body && { method: "POST", body: JSON.stringify(body) }), headers: headers(), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  throw new ApiError(await refusal(response), response.status, Number(response.headers.get("Retry-After")));
}

function headers() {
  const token = sessionStorage.getItem(TOKEN);
  return { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };
}

async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}`;
  }
}

/** Yield the objects of a stream of server-sent events, up to `[DONE]`. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError("The server ended before the answer did.");
      held += value.replaceAll("\r", "");
      const whole = held.split("\n\n");
      held = whole.pop();
      for (const event of whole) {
        const data = event.match(/^data: ?(.*)$/m)?.[1];
        if (data === "[DONE]") return;
        if (data) yield checked(JSON.parse(data));
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError("The server ended before the answer did.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

function checked(chunk) {
  if (chunk.error) throw new ApiError(chunk.error.message);
  return chunk;
}
