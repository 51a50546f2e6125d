// The chat page: what was said so far, and one answer at a time.

import { ApiError, chat, models, useKey } from "./api.js";
import { Reply } from "./reply.js";

const LOADING_RETRY_MS = 1000;
const NEAR_END = 40;  // pixels

const byId = (id) => document.getElementById(id);
const [scroller, log, form, prompt, notice] = ["scroller", "chat", "composer", "prompt", "notice"].map(byId);
let history = [];  // messages of the API, without the system prompt
let answering = null;  // AbortController of the answer under way
let atEnd = true;  // whether the end of the chat is in sight, and is to stay there as it grows
let followedTo = 0;  // where it was scrolled to for that

async function loadModels() {
  let names = [];
  try {
    names = await models();
  } catch (error) {
    if (error.status !== 503) return tell(error);
  }
  if (!names.length) {
    notice.textContent = "The model is being loaded…";
    setTimeout(loadModels, LOADING_RETRY_MS);
    return;
  }
  notice.textContent = "";
  byId("model").replaceChildren(...names.map((name) => new Option(name)));
  byId("model").disabled = names.length === 1;
}

// Says an error below the chat; where a key is wanted, asks for it.
function tell(error) {
  notice.textContent = reasonOf(error);
  if (error.status !== 401) return;
  byId("key-form").hidden = false;
  byId("key").focus();
}

function reasonOf(error) {
  if (error.name === "AbortError") return "";
  return error instanceof ApiError ? error.message : `the server can't be reached: ${error.message}`;
}

function requestBody() {
  const system = byId("system").value.trim();
  const typed = [...form.querySelectorAll("input[name]")].filter((input) => input.value !== "");
  return {
    model: byId("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history],
    ...Object.fromEntries(typed.map((input) => [input.name, input.valueAsNumber])),
    stream: true,
    stream_options: { include_usage: true },
    engram: { usage: true, activity: byId("activity").checked },
  };
}

async function ask(text) {
  const question = addQuestion(text);
  const reply = new Reply(log);
  atEnd = true;
  history.push({ role: "user", content: text });
  setAnswering(new AbortController());
  const error = await receive(reply).catch((thrown) => thrown);
  setAnswering(null);
  if (error && !reply.content) {
    history.pop();
    [question, reply.article].forEach((part) => part.remove());
    prompt.value ||= text;
    return tell(error);
  }
  history.push({ role: "assistant", content: reply.content });
  if (error) breakOff(reply, error);
}

async function receive(reply) {
  let reason = "";
  let usage = null;
  for await (const chunk of chat(requestBody(), answering.signal)) {
    for (const choice of chunk.choices) {
      reply.add(choice);
      reason = choice.finish_reason ?? reason;
    }
    usage = chunk.usage ?? usage;
  }
  reply.finish(reason, usage);
}

function breakOff(reply, error) {
  const stopped = error.name === "AbortError";
  reply.finish(stopped ? "stopped" : "broken off", null);
  if (!stopped) reply.fail(reasonOf(error));
}

function addQuestion(text) {
  const question = document.createElement("article");
  question.className = "question";
  question.ariaLabel = "You";
  question.textContent = text;
  log.append(question);
  return question;
}

function setAnswering(controller) {
  answering = controller;
  byId("stop").hidden = !answering;
  byId("send").hidden = byId("new-chat").disabled = Boolean(answering);
}

// By the time a scroll to the end is told of, more may have been said below.
scroller.addEventListener("scroll", () => {
  if (scroller.scrollTop === followedTo) return;
  atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;
});

const follow = new ResizeObserver(() => {
  if (!atEnd) return;
  scroller.scrollTop = scroller.scrollHeight;
  followedTo = scroller.scrollTop;
});
[scroller, log].forEach((part) => follow.observe(part));

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || answering) return;
  prompt.value = notice.textContent = "";
  ask(text);
});

prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

// A field that can't be sent is to be seen.
form.addEventListener("invalid", () => { byId("settings").open = true; }, true);

byId("stop").addEventListener("click", () => answering.abort());

byId("new-chat").addEventListener("click", () => {
  history = [];
  log.replaceChildren();
  prompt.focus();
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value);
  byId("key-form").hidden = true;
  loadModels();
  prompt.focus();
});

loadModels();
