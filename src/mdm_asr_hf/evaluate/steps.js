// Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
function element(tag, className, text) {
  const node = document.createElement(tag);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// The cells of a canvas, and what shows them after a step.
function canvasOf(tokens, steps) {
  const cells = element("div", "cells");
  const parts = tokens.map(([text, confidence, step]) => {
    const cell = element("span", text.startsWith(" ") ? "cell start" : "cell");
    const word = element("span", "token");
    const note = element("small", "");
    // As wide as either content, so that nothing moves from step to step.
    word.style.minWidth = `${Math.max([...text.trim()].length, 6)}ch`;
    cell.style.setProperty("--doubt", `${Math.round(100 * (1 - (confidence ?? 1)))}%`);
    cell.append(word, note);
    cells.append(cell);
    return {cell, word, note, text, confidence, step};
  });

  function draw(now) {
    let count = 0, fresh = 0;
    for (const {cell, word, note, text, confidence, step} of parts) {
      const committed = step <= now;
      const sure = confidence === null ? "" : `${Math.round(100 * confidence)} %`;
      cell.classList.toggle("masked", !committed);
      cell.classList.toggle("fresh", committed && step === now && now > 0);
      word.textContent = committed ? text.trim() || JSON.stringify(text) : "[MASK]";
      note.textContent = committed ? `${step}${sure && ` · ${sure}`}` : "\u00a0";
      cell.title = committed ? `${JSON.stringify(text)}, step ${step}${sure && `, confidence ${confidence}`}` : `masked after step ${now}`;
      count += committed;
      fresh += committed && step === now && now > 0;
    }
    return `step ${now} of ${steps}: ${fresh} committed, ${count} of ${parts.length} tokens done`;
  }
  return [cells, draw];
}

// The donor's text with its drafts, and what shows them after an evaluation.
function draftsOf(items, steps) {
  const names = {masks: "masks", hypothesis: "hypothesis"};
  const text = element("p", "drafts");
  const parts = items.map(([content, step, branch, confidence]) => {
    const struck = confidence === undefined;
    const node = element(struck ? "del" : branch ? "mark" : "span", branch ?? "", content);
    const source = branch ? `${struck ? "struck" : "accepted"} draft, ${names[branch]}` : "the donor's own token";
    node.title = `${JSON.stringify(content)}: ${source}, evaluation ${step}${struck ? "" : `, confidence ${confidence}`}`;
    text.append(node);
    return {node, step, branch, struck};
  });

  function draw(now) {
    const count = {done: 0, own: 0, masks: 0, hypothesis: 0, struck: 0};
    for (const {node, step, branch, struck} of parts) {
      node.hidden = step > now;
      node.classList.toggle("fresh", step === now && now > 0);
      if (!struck) count.done += step <= now;
      if (step === now) count[struck ? "struck" : branch ?? "own"] += 1;
    }
    const all = parts.filter((part) => !part.struck).length;
    return `evaluation ${now} of ${steps}: ${count.own} of the donor, ${count.masks} drafted by masks, `
      + `${count.hypothesis} by the hypothesis, ${count.struck} struck; ${count.done} of ${all} tokens done`;
  }
  return [text, draw];
}

// Draws a decoding into a <details>, at a step; `moved` is told where the reader moves to.
function drawSteps(details, {steps, tokens, items}, first, moved = () => {}) {
  const bar = element("div", "stepper");
  const play = element("button", "", "▶ play");
  const slider = element("input", "");
  Object.assign(slider, {type: "range", min: 0, max: steps, step: 1});
  slider.setAttribute("aria-label", "decoding step");
  const status = element("output", "");
  bar.append(play, slider, status);
  const [content, show] = items ? draftsOf(items, steps) : canvasOf(tokens, steps);
  const draw = () => { status.textContent = show(Number(slider.value)); };

  let timer = 0;
  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "▶ play";
  }
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) >= steps) slider.value = 0;
    play.textContent = "❚❚ pause";
    draw();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      draw();
      if (Number(slider.value) >= steps || !details.open) stop();
    }, 400);
  });
  slider.addEventListener("input", () => { stop(); draw(); moved(slider.value); });
  // Of a canvas the first step; of drafts all of them, since the text can be read at once.
  slider.value = first ?? (items ? steps : 1);
  draw();
  details.querySelector(".decoding").replaceChildren(bar, content);
}
