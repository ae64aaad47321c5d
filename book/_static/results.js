// The search page's summaries: the page's text without the tables and code that are folded away, and formulas as they were written.
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const text = Search.htmlToText;
  const hidden = [
    "details.symbols", "details.hide", ".equation-code", ".bd-sidebar-secondary", ".reproducibility",
    "#print-main-content", ".bd-header-article", ".header-article",
  ].join();
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    page.querySelectorAll(hidden).forEach(e => e.remove());
    page.querySelectorAll(".math").forEach(e => {
      const parts = e.textContent.replace(/^\\[([]|\\[)\]]$/g, "").split(/\\class\{[\w -]+\}/);
      e.textContent = parts[0] + parts.slice(1).map(part => {
        let depth = 0;
        const end = [...part].findIndex(c => (depth += (c === "{") - (c === "}")) === 0);
        return end < 0 ? part : part.slice(1, end) + part.slice(end + 1); // a symbol within a symbol stays in braces
      }).join("");
    });
    return text(page.documentElement.outerHTML, anchor && "#" + CSS.escape(anchor.slice(1)));
  };
});
