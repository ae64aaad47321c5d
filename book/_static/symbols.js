// Symbols light up in the formulas and in the code together, and say what they are.
// The page carries the data as JSON; formulas carry `sym sym-NAME` classes, set when the book is built.
(() => {
  // A display formula is one stop of the Tab key, whenever MathJax (re)places it: on a phone it may have to be scrolled.
  const stop = box => {
    for (const formula of box.querySelectorAll("mjx-container")) {
      formula.tabIndex = 0;
      formula.setAttribute("role", "group");
      formula.setAttribute("aria-label", "Formula");
    }
  };
  const placed = new MutationObserver(records => records.forEach(record => stop(record.target)));
  for (const box of document.querySelectorAll("div.math")) {
    placed.observe(box, { childList: true });
    stop(box);
  }

  // A formula in the text cannot break: one that is wider than its column scrolls by itself, not the page.
  const fit = box => {
    const formula = box.querySelector("mjx-container");
    const column = box.closest("p, li, dd, dt, td, th, figcaption, summary, div");
    const wide = Boolean(formula) && formula.offsetWidth > column.clientWidth;
    box.classList.toggle("wide", wide);
    if (wide) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  };
  const inline = [...document.querySelectorAll("span.math")];
  const set = new MutationObserver(records => new Set(records.map(record => record.target)).forEach(fit));
  for (const box of inline) set.observe(box, { childList: true });

  addEventListener("resize", () => inline.forEach(fit));

  // So does a figure on a phone, by its style. It may be hidden until somebody unfolds what it is in.
  const sized = new ResizeObserver(records => records.forEach(({ target: box }) => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }));
  for (const box of document.querySelectorAll("div.output:has(> svg.ewc-figure)")) sized.observe(box);

  const holder = document.getElementById("symbols-data");
  if (!holder) return;
  const { symbols, codes } = JSON.parse(holder.textContent);

  // A name in the code is the quantity when it stands alone. After a dot, as the name of an argument, as a loop's
  // variable of one letter or when the page imports it, it is something else, unless symbols.yml lists it in that form:
  // `.weight`, `lr=`, `for x`.
  const cells = [...document.querySelectorAll(".cell_input .highlight pre")];
  const importsOf = pre => [...pre.textContent.matchAll(/^\s*(?:from\s+\S+\s+)?import\s+(\([^)]*\)|[^#\n]*)/gm)]
    .flatMap(match => match[1].match(/\w+/g) ?? []);
  const imported = new Set(cells.flatMap(importsOf));

  function loopVariables(pre) {
    const found = new Set();
    let inside = false;
    for (const token of pre.querySelectorAll(".k, .ow, .n")) {
      if (token.matches(".k")) inside = token.textContent === "for";
      else if (token.matches(".ow")) inside = false; // in
      else if (inside && token.textContent.length === 1) found.add(token.textContent);
    }
    return found;
  }

  function mark(element, form) {
    if (Object.hasOwn(codes, form)) element.dataset.sym = codes[form];
  }

  for (const pre of document.querySelectorAll(".cell_input .highlight pre, .highlight-python pre")) {
    const code = pre.textContent, inCell = cells.includes(pre), own = new Set(importsOf(pre));
    const isModule = (name, after) => own.has(name) || (imported.has(name) && (inCell || after.startsWith(".")));
    const loops = loopVariables(pre);
    const texts = document.createTreeWalker(pre, NodeFilter.SHOW_TEXT);
    let before = "";
    for (let text = texts.nextNode(); text; text = texts.nextNode()) {
      const name = text.data, element = text.parentElement;
      const after = code.slice(before.length + name.length);
      if (element.matches(".n")) {
        if (/\.\s*$/.test(before)) mark(element, `.${name}`);
        else if (/^=(?!=)/.test(after)) mark(element, `${name}=`);
        else if (loops.has(name)) mark(element, `for ${name}`);
        else if (!isModule(name, after)) mark(element, name);
      }
      before += name;
    }
  }
  for (const element of document.querySelectorAll("code.literal > .pre")) {
    if (!imported.has(element.textContent)) mark(element, element.textContent);
  }

  const tip = document.createElement("div");
  tip.id = "symbol-tip";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  // One rule in one style sheet, so that formulas that are typeset later light up too.
  const rule = document.createElement("style");
  document.body.append(tip);
  document.head.append(rule);

  const nameOf = element => element.dataset.sym ?? [...element.classList].find(c => c.startsWith("sym-"))?.slice(4);

  function symbolAt(target) {
    const element = target instanceof Element ? target.closest(".sym, [data-sym]") : null;
    return element && Object.hasOwn(symbols, nameOf(element)) ? element : null;
  }

  function show(element) {
    const name = nameOf(element);
    const { name: title, meaning, shape, unit } = symbols[name];
    rule.textContent = `.sym-${name}, [data-sym="${name}"] {
      background: var(--symbol-background); outline: 2px solid var(--symbol-outline); border-radius: 2px; }`;
    const strong = document.createElement("strong");
    strong.textContent = title;
    const facts = document.createElement("span");
    facts.textContent = `shape: ${shape}; unit: ${unit}`;
    tip.replaceChildren(strong, `: ${meaning}`, facts);
    tip.hidden = false;
    const box = element.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8));
    const above = box.top - tip.offsetHeight - 8;
    const top = above > 60 ? above : box.bottom + 8; // 60: the page's header
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${top + scrollY}px`;
  }

  function hide() {
    tip.hidden = true;
    rule.textContent = "";
  }

  function follow(event) {
    if (tip.contains(event.target)) return; // the pointer may rest on the explanation
    const element = symbolAt(event.target);
    if (element) show(element);
    else hide();
  }

  document.addEventListener("pointerover", follow);
  document.addEventListener("click", follow); // a tap
  document.addEventListener("focusin", event => { if (event.target.matches("button.symbol")) show(event.target); });
  document.addEventListener("focusout", hide);

  // Inside a display formula the arrow keys go from symbol to symbol.
  let at = -1;
  document.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") { hide(); at = -1; }
    const formula = document.activeElement?.closest("mjx-container");
    if (!step || !formula) return;
    const inside = [...formula.querySelectorAll(".sym")].filter(e => !e.closest("mjx-assistive-mml") && symbolAt(e));
    if (!inside.length) return;
    event.preventDefault();
    at = at < 0 && step < 0 ? inside.length - 1 : (at + step + inside.length) % inside.length;
    inside[at].scrollIntoView({ block: "nearest", inline: "nearest" }); // in a formula that is wider than its column
    show(inside[at]);
  });
  document.addEventListener("focusin", () => { at = -1; });
})();
