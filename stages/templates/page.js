"use strict";
(() => {
  const tip = document.getElementById("tip");
  const show = (event) => {
    const mark = event.target.closest(".chart [aria-label], .strip [data-words]");
    const words = mark && (mark.dataset.words
      || (mark.getAttribute("role") === "graphics-symbol" && mark.getAttribute("aria-label")));
    tip.hidden = !words;
    if (!words) return;
    tip.textContent = words;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, innerWidth - width - 8))}px`;
    const below = event.clientY + 16;
    tip.style.top = `${below + height > innerHeight ? event.clientY - height - 12 : below}px`;
  };
  // a finger that taps does not move
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, show);

  const cut = new ResizeObserver((boxes) => {
    for (const { target } of boxes)
      target.classList.toggle("cut", target.scrollWidth > target.clientWidth + 1);
  });
  for (const box of document.querySelectorAll(".scroll")) cut.observe(box);
})();
