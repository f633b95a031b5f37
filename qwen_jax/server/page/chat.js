// Script of the chat page, a client of its server's API. Generated text is inserted as text nodes
// only, never as markup.

const byId = (id) => document.getElementById(id);
const [log, scroll, status] = ["log", "scroll", "status"].map(byId);
const [input, send, stop] = ["input", "send", "stop"].map(byId);
const [regenerate, clear, settings] = ["regenerate", "clear", "settings"].map(byId);
const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];

const messages = []; // {role, content} of the conversation, in the API's format
let model = null;
let running = null; // AbortController of the answer being generated

// Keeps the value of a field in `store()`: settings in localStorage, the API key in sessionStorage,
// which ends with the tab. A browser may forbid both.
function persistField(store, id) {
  const field = byId(id);
  try {
    field.value = store().getItem(`chat.${id}`) ?? "";
    field.addEventListener("change", () => {
      try {
        store().setItem(`chat.${id}`, field.value);
      } catch { /* not stored */ }
    });
  } catch { /* not stored */ }
}
for (const id of [...NUMBERS, "system"]) persistField(() => localStorage, id);
persistField(() => sessionStorage, "key");

// Returns the headers of an API request.
function headers() {
  const key = byId("key").value.trim();
  const all = { "content-type": "application/json" };
  if (key) all.authorization = `Bearer ${key}`;
  return all;
}

// Returns the message of an error response.
async function errorMessage(response) {
  try {
    const message = (await response.json()).error.message;
    return response.status === 401 ? `${message} (Settings, API key)` : message;
  } catch {
    return `The server responded with status ${response.status}.`;
  }
}

// Gets the name of the served model and shows it as the title.
async function loadModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await errorMessage(response));
  model = (await response.json()).data[0].id;
  byId("model").textContent = model;
  document.title = model;
}

// --- rendering ----------------------------------------------------------------------------------

function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Renders fenced code, inline code and bold of Markdown; all other text is shown unchanged.
function renderText(target, text) {
  const parts = text.split(/^```[^\n`]*\n([\s\S]*?)(?:^```[ \t]*(?:\n|$)|$(?![\s\S]))/m);
  const nodes = parts.flatMap((part, i) => {
    if (i % 2) {
      const block = element("pre");
      block.append(element("code", "", part.replace(/\n$/, "")));
      return [block];
    }
    // The block has its own margin instead of the line breaks.
    if (i > 0) part = part.replace(/^\n/, "");
    if (i + 1 < parts.length) part = part.replace(/\n\n?$/, "");
    return part.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((piece, k) => {
      if (k % 2 === 0) return document.createTextNode(piece);
      if (piece[0] === "`") return element("code", "", piece.slice(1, -1));
      return element("strong", "", piece.slice(2, -2));
    });
  });
  target.replaceChildren(...nodes);
}

// Appends an empty turn to the conversation and returns its elements.
function addTurn(role) {
  byId("hint")?.remove();
  const turn = element("article", `turn ${role}`);
  const text = element("div", "text");
  turn.append(text);
  log.append(turn);
  return { turn, text };
}

function scrollToEnd() {
  scroll.scrollTop = scroll.scrollHeight;
}

function isAtEnd() {
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
}

// Shows and enables the buttons that apply to the current state.
function updateButtons() {
  send.hidden = running !== null;
  stop.hidden = running === null;
  const last = messages.at(-1)?.role;
  regenerate.disabled = running !== null || last === undefined;
  clear.disabled = running !== null || last === undefined;
}

// --- requests -----------------------------------------------------------------------------------

// Returns the body of a chat completion request for the next answer.
function requestBody() {
  const system = byId("system").value.trim();
  const body = {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const id of NUMBERS) {
    const value = byId(id).value;
    if (value !== "") body[id] = Number(value);
  }
  return body;
}

// Yields the parsed data of each server-sent event of a response body, until [DONE].
async function* parseEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection was lost.");
    const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;
      const data = block.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// Returns the token count, the generation rate and the time to the first token as text.
function speedText(answer) {
  const tokens = answer.tokens ?? answer.pieces;
  const about = answer.tokens === null ? "about " : "";
  const seconds = (performance.now() - answer.first) / 1000;
  const wait = ((answer.first - answer.start) / 1000).toFixed(2);
  const rate = tokens > 1 && seconds > 0 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s · ` : "";
  return `${about}${tokens} tokens · ${rate}first token after ${wait} s`;
}

// Appends a streamed response to `answer` and calls `onText` after each piece of text.
async function readStream(response, answer, onText) {
  for await (const event of parseEvents(response.body)) {
    if (event.usage) answer.tokens = event.usage.completion_tokens;
    const choice = event.choices[0];
    if (!choice) continue;
    const { content, reasoning_content: reasoning } = choice.delta;
    if (content || reasoning) {
      answer.first ??= performance.now();
      answer.pieces += 1;
      answer.content += content ?? "";
      answer.reasoning += reasoning ?? "";
      onText();
    }
    answer.finish = choice.finish_reason ?? answer.finish;
  }
}

// Requests the next answer and shows it while it is generated.
async function generateReply() {
  const { turn, text } = addTurn("assistant");
  turn.classList.add("waiting");
  scrollToEnd();
  const answer = {
    content: "", reasoning: "", finish: null, tokens: null, pieces: 0,
    start: performance.now(), first: null,
  };
  let drawScheduled = false;
  const draw = () => {
    drawScheduled = false;
    const wasAtEnd = isAtEnd();
    renderText(text, answer.content);
    if (answer.reasoning) {
      let box = turn.querySelector("details");
      if (!box) {
        box = element("details");
        box.append(element("summary", "", "Reasoning"), element("div", "text"));
        turn.prepend(box);
      }
      box.querySelector("div").textContent = answer.reasoning;
    }
    if (answer.first !== null) status.textContent = speedText(answer);
    if (wasAtEnd) scrollToEnd();
  };
  // Draws at most once per frame, however fast tokens arrive.
  const scheduleDraw = () => {
    if (!drawScheduled) requestAnimationFrame(draw);
    drawScheduled = true;
  };
  let problem = null;
  running = new AbortController();
  updateButtons();
  status.textContent = "";
  try {
    if (!model) await loadModel();
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(requestBody()),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await errorMessage(response));
    await readStream(response, answer, scheduleDraw);
  } catch (error) {
    if (error.name !== "AbortError") {
      // `fetch` throws a TypeError if there is no connection.
      problem = error instanceof TypeError ? "The server can't be reached." : error.message;
    } else {
      answer.finish = "stopped";
    }
  }
  turn.classList.remove("waiting");
  draw();
  if (problem) turn.append(element("p", "error", problem));
  if (answer.finish === "length") turn.append(element("p", "note", "Stopped at the maximum length."));
  if (answer.finish === "stopped") turn.append(element("p", "note", "Stopped."));
  if (answer.content) messages.push({ role: "assistant", content: answer.content });
  if (problem && isAtEnd()) scrollToEnd();
  running = null;
  updateButtons();
  input.focus();
}

// Adds a message of the user and requests the answer.
function sendMessage(text) {
  messages.push({ role: "user", content: text });
  addTurn("user").text.textContent = text;
  generateReply();
}

// --- user input ---------------------------------------------------------------------------------

// Fits the height of the input field to its text.
function resizeInput() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (!text || running) return;
  if (!settings.checkValidity()) {
    toggleSettings(true);
    settings.reportValidity();
    return;
  }
  input.value = "";
  resizeInput();
  sendMessage(text);
});

input.addEventListener("keydown", (event) => {
  // Enter does not send while an input method composes a character, such as a Chinese one.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
});
input.addEventListener("input", resizeInput);

stop.addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

regenerate.addEventListener("click", () => {
  if (running) return;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  while (log.lastElementChild?.classList.contains("assistant")) log.lastElementChild.remove();
  generateReply();
});

clear.addEventListener("click", () => {
  messages.length = 0;
  log.replaceChildren(element("p", "", "New conversation."));
  log.firstElementChild.id = "hint";
  status.textContent = "";
  updateButtons();
  input.focus();
});

function toggleSettings(open) {
  settings.hidden = !open;
  byId("toggle").setAttribute("aria-expanded", String(open));
}
byId("toggle").addEventListener("click", () => toggleSettings(settings.hidden));
settings.addEventListener("submit", (event) => event.preventDefault());

byId("key").addEventListener("change", () => loadModel().then(() => {
  status.textContent = "";
}, (error) => {
  status.textContent = error.message;
}));
loadModel().catch((error) => {
  status.textContent = error.message;
});
updateButtons();
