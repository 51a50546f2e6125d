// One answer: its text token by token, the strip of what tables did before each, and figures.

const ROWS_SHOWN = 24;  // of a site's row ids in the tip
const GAP = 8;  // pixels between the tip, what it is of, and the window's edges
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const tip = document.getElementById("tip");

function element(parent, tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  parent.append(made);
  return made;
}

function percent(share) {
  return share === null ? "∞" : `${number.format(100 * share)} %`;
}

export class Reply {
  constructor(parent) {
    const article = document.getElementById("reply").content.cloneNode(true).firstElementChild;
    const part = (name) => article.querySelector(`.${name}`);
    [this.text, this.activity, this.sites] = ["text", "activity", "sites"].map(part);
    [this.strip, this.figures, this.error] = ["strip", "figures", "error"].map(part);
    this.article = article;
    this.tokens = [];  // as the server told them
    this.started = performance.now();
    this.count = 0;
    article.ariaBusy = "true";
    for (const area of [this.text, this.strip]) {
      area.addEventListener("pointerover", (event) => this.select(event.target));
      area.addEventListener("pointerleave", () => this.deselect());
    }
    this.strip.addEventListener("focusin", (event) => this.select(event.target));
    this.strip.addEventListener("focusout", () => this.deselect());
    this.strip.addEventListener("keydown", (event) => this.move(event));
    parent.append(article);
  }

  get content() {
    return this.text.textContent;
  }

  // Adds what a chunk's choice tells.
  add(choice) {
    const content = choice.delta?.content ?? "";
    const tokens = choice.engram?.tokens ?? [];
    if (tokens.length) tokens.forEach((token) => this.addToken(token));
    else if (content) this.text.append(content);
    this.count += tokens.length || (content ? 1 : 0);
    if (!this.count) return;
    this.latest = performance.now();
    this.first ??= this.latest;
    this.figures.textContent = this.speed().join(" · ");
  }

  addToken(token) {
    const sites = Object.entries(token.sites ?? {});
    if (!sites.length) return void this.text.append(token.text);
    const index = this.tokens.push(token) - 1;
    if (index === 0) {
      this.activity.hidden = false;
      for (const [name] of sites) element(this.sites, "span", "site", name);
    }
    const gates = sites.map(([, site]) => site.gate);
    this.addSpan(token, index, Math.max(...gates));
    this.addColumn(token, index, gates);
  }

  addSpan(token, index, gate) {
    const span = element(this.text, "span", "token", token.text);
    span.dataset.token = index;
    span.style.setProperty("--gate", gate);
  }

  addColumn(token, index, gates) {
    const column = element(this.strip, "button", "column");
    column.type = "button";
    column.dataset.token = index;
    column.tabIndex = index === 0 ? 0 : -1;  // one stop of the Tab key for the whole strip
    column.ariaLabel = `${JSON.stringify(token.text)}: gate ${gates.map((gate) => gate.toFixed(2)).join(", ")}`;
    for (const gate of gates) element(column, "span", "cell").style.setProperty("--gate", gate);
  }

  speed() {
    const figures = [`first token ${number.format(this.first - this.started)} ms`];
    const seconds = (this.latest - this.first) / 1000;
    if (seconds > 0) figures.push(`${number.format((this.count - 1) / seconds)} tok/s`);
    figures.push(`${number.format(this.count)} tokens`);
    return figures;
  }

  // Ends the answer: reason as the server gave it or "stopped", usage of the last chunk where there was one.
  finish(reason, usage) {
    this.article.ariaBusy = "false";
    this.count = usage?.completion_tokens ?? this.count;
    const figures = this.count && this.first ? this.speed() : [];
    if (usage) figures.push(`prompt ${number.format(usage.prompt_tokens)}${cached(usage)}`);
    if (usage?.engram) figures.push(...memoryFigures(usage.engram));
    this.figures.textContent = [...figures, reason].join(" · ");
  }

  fail(message) {
    this.error.textContent = message;
    this.error.hidden = false;
  }

  select(target) {
    this.deselect();
    const marked = target.closest("[data-token]");
    if (!marked) return;
    const index = marked.dataset.token;
    for (const part of this.article.querySelectorAll(`[data-token="${index}"]`)) part.classList.add("current");
    showTip(this.tokens[index], marked);
  }

  deselect() {
    for (const part of this.article.querySelectorAll(".current")) part.classList.remove("current");
    tip.hidden = true;
  }

  move(event) {
    if (event.key === "Escape") return this.deselect();
    const here = event.target.closest(".column");
    const next = {
      ArrowLeft: here.previousElementSibling,
      ArrowRight: here.nextElementSibling,
      Home: this.strip.firstElementChild,
      End: this.strip.lastElementChild,
    }[event.key];
    if (!next) return;
    event.preventDefault();
    here.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

function cached(usage) {
  const tokens = usage.prompt_tokens_details?.cached_tokens;
  return tokens ? ` (${number.format(tokens)} cached)` : "";
}

function memoryFigures({ sites, drafts }) {
  const total = (name) => Object.values(sites).reduce((sum, site) => sum + site[name], 0);
  const figures = [
    `${number.format(total("rows"))} rows, ${number.format(total("bytes") / 1024)} KiB`,
    `${number.format(total("cold"))} cold`,
    `waited ${number.format(total("wait_ms"))} ms`,
  ];
  return drafts ? [...figures, `${drafts.accepted} of ${drafts.made} drafts`] : figures;
}

function showTip(token, beside) {
  tip.replaceChildren();
  element(tip, "p", "said", `${JSON.stringify(token.text)}  token ${token.id}`);
  for (const [name, site] of Object.entries(token.sites)) {
    const more = site.rows.length - ROWS_SHOWN;
    const rows = site.rows.slice(0, ROWS_SHOWN).join(" ") + (more > 0 ? ` and ${more} more` : "");
    element(tip, "p", "reading", `${name}  gate ${site.gate.toFixed(3)}  adds ${percent(site.contribution)} to the stream`);
    element(tip, "p", "rows", `${site.rows.length} rows: ${rows}`);
  }
  tip.hidden = false;
  // Above a token of the text, so that its cell below stays in sight; its first line, if it has several.
  place(beside.getClientRects()[0], beside.matches(".token"));
}

// Puts the tip below a box or above it: where it is wanted, or else where there is room.
function place(box, wantedAbove) {
  const { clientWidth, clientHeight } = document.documentElement;
  const above = box.top - tip.offsetHeight - GAP;
  const below = box.bottom + GAP;
  const fitsBelow = below + tip.offsetHeight <= clientHeight;
  tip.style.left = `${Math.max(GAP, Math.min(box.left, clientWidth - tip.offsetWidth - GAP))}px`;
  tip.style.top = `${above >= 0 && (wantedAbove || !fitsBelow) ? above : below}px`;
}
