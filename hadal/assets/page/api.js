// Talking to the server: the key, one clear error for whatever goes wrong, and the event stream of an answer.

export class APIError extends Error {
  /** `status` is 0 when the server was not reached; `wait` is how many seconds it asks to wait. */
  constructor(message, status = 0, wait = 0) {
    super(message);
    Object.assign(this, { status, wait });
  }
}

export const key = {
  get: () => sessionStorage.getItem("hadal.key") ?? localStorage.getItem("hadal.key") ?? "",
  get remembered() {
    return localStorage.getItem("hadal.key") !== null;
  },
  set(text, remember) {
    for (const store of [sessionStorage, localStorage]) store.removeItem("hadal.key");
    if (text) (remember ? localStorage : sessionStorage).setItem("hadal.key", text);
  },
};

async function request(path, { body, ...options } = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    const sent = body && { method: "POST", body: JSON.stringify(body) };
    response = await fetch(path, { ...options, ...sent, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new APIError("The server cannot be reached. Check that it runs and that this device is connected to it.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  const after = response.headers.get("retry-after") ?? "";
  const wait = Number(after) || Math.max(0, Math.ceil((Date.parse(after) - Date.now()) / 1000)) || 0;
  throw new APIError(told.error?.message ?? `The server answered ${response.status}.`, response.status, wait);
}

export const models = async () => (await (await request("v1/models")).json()).data;
export const status = async (signal) => (await request("status", { signal })).json();

export async function countTokens(model, prompt) {
  const body = { model, prompt, return_tokens: false };
  return (await (await request("v1/tokenize", { body })).json()).count;
}

/** The chunks of an answer as they come; throws APIError, also for errors that travel as events. */
export async function* chat(body, signal) {
  const headers = { "x-hadal-cost": "usd" };
  const response = await request("v1/chat/completions", { body: { ...body, stream: true }, headers, signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new APIError(chunk.error.message, Number(chunk.error.status) || 500);
    yield chunk;
  }
  throw new APIError("The connection ended before the answer did.");
}

/** The `data` of each server-sent event; comments, which keep the connection open, are passed over. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      const lines = rest.split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (!line && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof APIError) throw error;
    throw new APIError("The connection was lost while the answer came in.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
