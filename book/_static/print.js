// Fonts of formulas load when a formula comes into view. Paper shows all of them at once and does not wait: load them early.
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  document.fonts.forEach(font => /^"?MJX(ZERO|TEX(-[BIAC]|-S[1-4])?)"?$/.test(font.family) && font.load());
});
