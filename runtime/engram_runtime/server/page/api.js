// The server's OpenAI-compatible API: models, and chats as streams of chunks.

const KEY = "engram.api-key";  // of this tab's sessionStorage

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const said = await response.json().catch(() => null);  // a proxy's error page isn't JSON
  const message = said?.error?.message ?? `the server answered ${response.status} ${response.statusText}`;
  const wait = response.headers.get("Retry-After");
  return new ApiError(wait ? `${message} (try again in ${wait} s)` : message, response.status);
}

// Names of the models that are loaded.
export async function models() {
  const { data } = await (await request("v1/models")).json();
  return data.map((model) => model.id);
}

// Yields the chunks of a streamed chat completion; throws ApiError where the server refuses or fails on the way.
export async function* chat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    yield chunk;
  }
  throw new ApiError("the answer broke off: the connection was closed before its end");
}

// Yields the data of each server-sent event, wherever the network cut the bytes.
async function* eventData(body) {
  let data = [];
  for await (const line of lines(body)) {
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    else if (line === "" && data.length) {
      yield data.join("\n");
      data = [];
    }
  }
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n");
    rest = whole.pop();
    for (const line of whole) yield line.replace(/\r$/, "");
  }
}
