// The chat page: talks to the API of its own server. Whatever the model writes becomes text nodes,
// never markup.

const byId = (id) => document.getElementById(id);
const [log, scroll, status] = ["log", "scroll", "status"].map(byId);
const [input, send, stop] = ["input", "send", "stop"].map(byId);
const [regenerate, clear, settings] = ["regenerate", "clear", "settings"].map(byId);
const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];

const messages = []; // {role, content} of the conversation, as the API wants them
let model = null;
let running = null; // AbortController of the answer under way

// Settings outlive the page, the key only the tab. A browser may forbid both.
function remember(store, id) {
  const field = byId(id);
  try {
    field.value = store().getItem(`chat.${id}`) ?? "";
    field.addEventListener("change", () => {
      try {
        store().setItem(`chat.${id}`, field.value);
      } catch { /* not kept */ }
    });
  } catch { /* not kept */ }
}
for (const id of [...NUMBERS, "system"]) remember(() => localStorage, id);
remember(() => sessionStorage, "key");

function headers() {
  const key = byId("key").value.trim();
  const all = { "content-type": "application/json" };
  if (key) all.authorization = `Bearer ${key}`;
  return all;
}

async function errorOf(response) {
  try {
    const told = (await response.json()).error.message;
    return response.status === 401 ? `${told} (Settings, API key)` : told;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await errorOf(response));
  model = (await response.json()).data[0].id;
  byId("model").textContent = model;
  document.title = model;
}

// --- showing ------------------------------------------------------------------------------------

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Fenced and inline code and bold; everything else as it stands.
function show(target, text) {
  const parts = text.split(/^```[^\n`]*\n([\s\S]*?)(?:^```[ \t]*(?:\n|$)|$(?![\s\S]))/m);
  const nodes = parts.flatMap((part, i) => {
    if (i % 2) {
      const block = element("pre");
      block.append(element("code", "", part.replace(/\n$/, "")));
      return [block];
    }
    // The block has a margin of its own.
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

function addTurn(role) {
  byId("hint")?.remove();
  const turn = element("article", `turn ${role}`);
  const text = element("div", "text");
  turn.append(text);
  log.append(turn);
  return { turn, text };
}

function follow() {
  scroll.scrollTop = scroll.scrollHeight;
}

function atEnd() {
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
}

function refresh() {
  send.hidden = running !== null;
  stop.hidden = running === null;
  const last = messages.at(-1)?.role;
  regenerate.disabled = running !== null || last === undefined;
  clear.disabled = running !== null || last === undefined;
}

// --- answering ----------------------------------------------------------------------------------

function question() {
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

// The values of a stream of server-sent events, until [DONE].
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection broke off.");
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

function speed(answer) {
  const tokens = answer.tokens ?? answer.pieces;
  const about = answer.tokens === null ? "about " : "";
  const seconds = (performance.now() - answer.first) / 1000;
  const wait = ((answer.first - answer.start) / 1000).toFixed(2);
  const rate = tokens > 1 && seconds > 0 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s · ` : "";
  return `${about}${tokens} tokens · ${rate}first after ${wait} s`;
}

async function read(response, answer, paint) {
  for await (const event of events(response.body)) {
    if (event.usage) answer.tokens = event.usage.completion_tokens;
    const choice = event.choices[0];
    if (!choice) continue;
    const { content, reasoning_content: thought } = choice.delta;
    if (content || thought) {
      answer.first ??= performance.now();
      answer.pieces += 1;
      answer.content += content ?? "";
      answer.thought += thought ?? "";
      paint();
    }
    answer.finish = choice.finish_reason ?? answer.finish;
  }
}

async function reply() {
  const { turn, text } = addTurn("assistant");
  turn.classList.add("waiting");
  follow();
  const answer = {
    content: "", thought: "", finish: null, tokens: null, pieces: 0,
    start: performance.now(), first: null,
  };
  let painted = false;
  const draw = () => {
    painted = false;
    const end = atEnd();
    show(text, answer.content);
    if (answer.thought) {
      let box = turn.querySelector("details");
      if (!box) {
        box = element("details");
        box.append(element("summary", "", "Thoughts"), element("div", "text"));
        turn.prepend(box);
      }
      box.querySelector("div").textContent = answer.thought;
    }
    if (answer.first !== null) status.textContent = speed(answer);
    if (end) follow();
  };
  // At most once a frame, however fast the tokens come.
  const paint = () => {
    if (!painted) requestAnimationFrame(draw);
    painted = true;
  };
  let problem = null;
  running = new AbortController();
  refresh();
  status.textContent = "";
  try {
    if (!model) await findModel();
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(question()),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await errorOf(response));
    await read(response, answer, paint);
  } catch (error) {
    if (error.name !== "AbortError") {
      const lost = error instanceof TypeError ? "The server can't be reached." : error.message;
      problem = lost;
    } else {
      answer.finish = "stopped";
    }
  }
  turn.classList.remove("waiting");
  draw();
  if (problem) turn.append(element("p", "error", problem));
  if (answer.finish === "length") turn.append(element("p", "note", "Cut at its longest length."));
  if (answer.finish === "stopped") turn.append(element("p", "note", "Stopped."));
  if (answer.content) messages.push({ role: "assistant", content: answer.content });
  if (problem && atEnd()) follow();
  running = null;
  refresh();
  input.focus();
}

function ask(text) {
  messages.push({ role: "user", content: text });
  addTurn("user").text.textContent = text;
  reply();
}

// --- what people do -----------------------------------------------------------------------------

function fit() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (!text || running) return;
  if (!settings.checkValidity()) {
    toggle(true);
    settings.reportValidity();
    return;
  }
  input.value = "";
  fit();
  ask(text);
});

input.addEventListener("keydown", (event) => {
  // Enter that ends the composition of a Chinese character does not send.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
});
input.addEventListener("input", fit);

stop.addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

regenerate.addEventListener("click", () => {
  if (running) return;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  while (log.lastElementChild?.classList.contains("assistant")) log.lastElementChild.remove();
  reply();
});

clear.addEventListener("click", () => {
  messages.length = 0;
  log.replaceChildren(element("p", "", "A new conversation."));
  log.firstElementChild.id = "hint";
  status.textContent = "";
  refresh();
  input.focus();
});

function toggle(open) {
  settings.hidden = !open;
  byId("toggle").setAttribute("aria-expanded", String(open));
}
byId("toggle").addEventListener("click", () => toggle(settings.hidden));
settings.addEventListener("submit", (event) => event.preventDefault());

byId("key").addEventListener("change", () => findModel().then(() => {
  status.textContent = "";
}, (error) => {
  status.textContent = error.message;
}));
findModel().catch((error) => {
  status.textContent = error.message;
});
refresh();
