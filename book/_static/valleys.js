// Two loss valleys, a spring between them, and where training goes: the picture of Kirkpatrick et al. (2017), Fig. 1.
//
// A page holds <div class="explorable valleys"><script type="application/json">DATA</script> ... </div>, which
// `plotting.explorable("valleys", DATA, alt=...)` writes. DATA, everything in the same two orthonormal directions:
//   a, b:      {hessian: [[., .], [., .]], optimum: [., .]}   the two tasks' losses, as quadratics around their optima
//   fisher:    [[., .], [., .]]                               what EWC multiplies the squared distance from A with
//   strength:  initial lambda (optional)
//   axes:      names of the two directions (optional)
// Task B is trained by gradient flow on L_B + (lambda/2) (theta - theta_A)' M (theta - theta_A), with M = 0 (no penalty),
// M = (tr F / 2) I (L2: the same stiffness in all, spread evenly) or M = F (EWC). On a quadratic the path is known exactly.
(() => {
  "use strict";

  // Mathematics: 2-vectors are [x, y], symmetric matrices [[p, q], [q, r]].
  const add = (m, n, k = 1) => m.map((row, i) => row.map((v, j) => v + k * n[i][j]));
  const apply = (m, v) => [m[0][0] * v[0] + m[0][1] * v[1], m[1][0] * v[0] + m[1][1] * v[1]];
  const minus = (u, v) => [u[0] - v[0], u[1] - v[1]];
  const solve = (m, v) => {
    const det = m[0][0] * m[1][1] - m[0][1] * m[1][0];
    return [(m[1][1] * v[0] - m[0][1] * v[1]) / det, (m[0][0] * v[1] - m[1][0] * v[0]) / det];
  };
  const trace = m => m[0][0] + m[1][1];

  // Eigenvalues (larger first) and the angle of the first eigenvector.
  const eigen = m => {
    const mean = trace(m) / 2, half = (m[0][0] - m[1][1]) / 2, radius = Math.hypot(half, m[0][1]);
    return { values: [mean + radius, mean - radius], angle: Math.atan2(m[0][1], half) / 2 };
  };

  const excess = (task, point) => {
    const d = minus(point, task.optimum), g = apply(task.hessian, d);
    return (d[0] * g[0] + d[1] * g[1]) / 2;
  };
  const METHODS = ["none", "l2", "ewc"];
  const stiffness = (data, method) => {
    if (method === "ewc") return data.fisher;
    const even = method === "l2" ? trace(data.fisher) / 2 : 0;
    return [[even, 0], [0, even]];
  };
  const system = (data, method, strength) => add(data.b.hessian, stiffness(data, method), strength);
  const end = (data, method, strength) => {
    const pull = apply(stiffness(data, method), data.a.optimum), push = apply(data.b.hessian, data.b.optimum);
    return solve(system(data, method, strength), [push[0] + strength * pull[0], push[1] + strength * pull[1]]);
  };
  // The flow at time t: every eigendirection relaxes to the end point on its own.
  const flow = (data, method, strength, start, t) => {
    const { values, angle } = eigen(system(data, method, strength)), goal = end(data, method, strength);
    const c = Math.cos(angle), s = Math.sin(angle), d = minus(start, goal);
    const u = (c * d[0] + s * d[1]) * Math.exp(-values[0] * t), v = (c * d[1] - s * d[0]) * Math.exp(-values[1] * t);
    return [goal[0] + c * u - s * v, goal[1] + s * u + c * v];
  };
  const path = (data, method, strength, start, points = 80) => {
    const { values } = eigen(system(data, method, strength));
    const first = 0.01 / values[0], last = 8 / Math.max(values[1], values[0] * 1e-9);
    const times = Array.from({ length: points }, (_, k) => first * (last / first) ** (k / (points - 1)));
    return [start, ...times.map(t => flow(data, method, strength, start, t))];
  };
  const balance = data => trace(data.b.hessian) / trace(data.fisher); // the lambda at which both pull alike
  const ellipse = (task, level, points = 72) => {
    const { values, angle } = eigen(task.hessian), c = Math.cos(angle), s = Math.sin(angle);
    const [r, q] = values.map(v => Math.sqrt(2 * level / Math.max(v, values[0] * 1e-6)));
    return Array.from({ length: points }, (_, k) => {
      const x = r * Math.cos(2 * Math.PI * k / points), y = q * Math.sin(2 * Math.PI * k / points);
      return [task.optimum[0] + c * x - s * y, task.optimum[1] + s * x + c * y];
    });
  };
  const NAMES = { none: "no penalty", l2: "L2", ewc: "EWC" };
  const number = v => v >= 100 ? Number(v.toPrecision(3)).toLocaleString("en-GB") : v.toPrecision(2);
  const describe = (data, strength) => {
    const loss = v => v < 0.0005 ? "0" : number(v);
    const cost = method => {
      const p = end(data, method, strength);
      return `${loss(excess(data.a, p))} on task A and ${loss(excess(data.b, p))} on task B`;
    };
    return `At \u03bb = ${number(strength)} the loss above each task's optimum ends at ${cost("none")} without a penalty, `
      + `${cost("l2")} with L2, ${cost("ewc")} with EWC.`;
  };

  if (typeof module !== "undefined") {
    module.exports = { METHODS, eigen, excess, end, flow, path, balance, ellipse, describe };
    return;
  }

  // Drawing
  const [WIDTH, HEIGHT] = innerWidth < 600 ? [380, 300] : [640, 420]; // on a phone letters and handle keep their size
  const element = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text) node.textContent = text;
    return node;
  };
  const LOOK = { // colour, dashes and the shape of the end point: never the colour alone
    none: { color: "var(--ewc-c5)", dash: "2 5", shape: "M-6-6L6 6M6-6L-6 6" },
    l2: { color: "var(--ewc-c2)", dash: "9 5", shape: "M0-7L7 6L-7 6Z" },
    ewc: { color: "var(--ewc-c3)", dash: "none", shape: "M-6-6H6V6H-6Z" },
  };

  const mount = (host, index) => {
    const data = JSON.parse(host.querySelector("script").textContent);
    const { a, b } = data, middle = [0, 1].map(i => (a.optimum[i] + b.optimum[i]) / 2);
    const scale = WIDTH / (1.9 * Math.hypot(...minus(a.optimum, b.optimum)));
    const toScreen = p => [WIDTH / 2 + (p[0] - middle[0]) * scale, HEIGHT / 2 - (p[1] - middle[1]) * scale];
    const toWorld = (x, y) => [middle[0] + (x - WIDTH / 2) / scale, middle[1] - (y - HEIGHT / 2) / scale];
    const line = points => points.map((p, k) => (k ? "L" : "M") + toScreen(p).map(v => v.toFixed(1)).join(" ")).join("");
    let start = a.optimum.slice();

    const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": "Two loss valleys and three paths" });
    const words = document.createElement("p");
    words.setAttribute("aria-live", "polite");
    const controls = document.createElement("div"), label = document.createElement("label");
    const slider = document.createElement("input"), reset = document.createElement("button");
    const centre = Math.log10(balance(data));
    Object.assign(slider, { type: "range", min: 0, max: 120, step: 1, id: `valleys-strength-${index}` });
    slider.value = Math.round(((data.strength ? Math.log10(data.strength) : centre) - centre + 3) * 20);
    label.htmlFor = slider.id;
    label.textContent = "Strength \u03bb";
    reset.type = "button";
    reset.textContent = "Start at A again";
    controls.append(label, slider, reset);
    host.querySelectorAll("p").forEach(p => p.remove()); // the words that stand in where scripts do not run
    host.append(svg, controls, words);

    for (const [task, color, dash] of [[a, "var(--ewc-c0)", "none"], [b, "var(--ewc-c1)", "5 3"]]) {
      const other = task === a ? b : a, far = excess(task, other.optimum);
      for (const part of [0.01, 0.06, 0.2, 0.5, 1]) {
        svg.append(element("path", { d: line(ellipse(task, part * far)) + "Z", fill: "none", stroke: color, "stroke-dasharray": dash, "stroke-opacity": 0.55 }));
      }
      const [x, y] = toScreen(task.optimum);
      svg.append(element("circle", { cx: x, cy: y, r: 3.5, fill: color }));
      svg.append(element("text", { x, y: y + 22, fill: color, "text-anchor": "middle", "font-weight": 650 }, task === a ? "task A" : "task B"));
    }
    const axes = data.axes || ["direction 1", "direction 2"];
    svg.append(element("text", { x: WIDTH - 8, y: HEIGHT - 8, "text-anchor": "end", class: "axis" }, `${axes[0]} \u2192`));
    svg.append(element("text", { x: 8, y: 18, class: "axis" }, `\u2191 ${axes[1]}`));
    const tracks = Object.fromEntries(METHODS.map(method => {
      const { color, dash, shape } = LOOK[method];
      const track = element("path", { fill: "none", stroke: color, "stroke-width": 2.5, "stroke-dasharray": dash });
      const mark = element("path", { d: shape, fill: method === "none" ? "none" : color, stroke: color, "stroke-width": 2 });
      const name = element("text", { fill: color, "font-weight": 650 }, NAMES[method]);
      svg.append(track, mark, name);
      return [method, { track, mark, name }];
    }));
    const handle = element("circle", { r: 11, tabindex: 0, role: "button", class: "handle" });
    svg.append(handle);

    const draw = () => {
      const strength = 10 ** (centre + slider.value / 20 - 3);
      const taken = [];
      for (const method of METHODS) {
        const { track, mark, name } = tracks[method], [x, y] = toScreen(end(data, method, strength));
        track.setAttribute("d", line(path(data, method, strength, start)));
        mark.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
        let row = y - 12; // a name gives way to those already written
        while (taken.some(([u, v]) => Math.abs(u - x) < 90 && Math.abs(v - row) < 16)) row -= 16;
        taken.push([x, row]);
        name.setAttribute("x", Math.min(x + 10, WIDTH - 100).toFixed(1));
        name.setAttribute("y", row.toFixed(1));
      }
      const [x, y] = toScreen(start);
      handle.setAttribute("cx", x);
      handle.setAttribute("cy", y);
      handle.setAttribute("aria-label", `Starting point at ${start.map(v => v.toPrecision(3)).join(", ")}: drag it or use the arrow keys`);
      slider.setAttribute("aria-valuetext", `lambda ${number(strength)}`);
      words.textContent = describe(data, strength);
    };
    const moveTo = (x, y) => {
      start = toWorld(Math.min(Math.max(x, 12), WIDTH - 12), Math.min(Math.max(y, 12), HEIGHT - 12));
      draw();
    };
    handle.addEventListener("pointerdown", event => {
      handle.setPointerCapture(event.pointerId);
      event.preventDefault();
      handle.focus();
    });
    handle.addEventListener("pointermove", event => {
      if (!handle.hasPointerCapture(event.pointerId)) return;
      const box = svg.getBoundingClientRect();
      moveTo((event.clientX - box.left) * WIDTH / box.width, (event.clientY - box.top) * HEIGHT / box.height);
    });
    handle.addEventListener("keydown", event => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const [x, y] = toScreen(start), far = event.shiftKey ? 40 : 10;
      moveTo(x + step[0] * far, y + step[1] * far);
    });
    reset.addEventListener("click", () => { start = a.optimum.slice(); draw(); });
    slider.addEventListener("input", draw);
    draw();
  };
  document.querySelectorAll(".explorable.valleys").forEach(mount);
})();
