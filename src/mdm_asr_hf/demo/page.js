// Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
// A word that is clicked on is heard. Short ones are not told from a click: a fifth of a second at least.
let hearing = 0;
document.addEventListener("click", async ({target}) => {
  const word = target.closest(".word");
  if (!word) return;
  const result = word.closest(".result");
  const audio = result.querySelector("audio");
  const start = Number(word.dataset.start);
  const end = Math.max(Number(word.dataset.end), start + 0.2);
  clearInterval(hearing);
  try {
    audio.currentTime = start;
    await audio.play();
    hearing = setInterval(() => {
      if (audio.currentTime < end && !audio.ended) return;
      audio.pause();
      clearInterval(hearing);
    }, 10);
  } catch (error) {
    // A second click ends the first one's play.
    if (error.name !== "AbortError") result.querySelector(".unheard").textContent = "This browser cannot play this file.";
  }
});
// Drawn when they are opened, as those are that come open.
document.addEventListener("toggle", ({target}) => {
  if (target.open && target.dataset.steps && !target.querySelector(".stepper")) drawSteps(target, JSON.parse(target.dataset.steps));
}, true);
