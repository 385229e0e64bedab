(function () {
  "use strict";
  const store = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const plots = Array.from(document.querySelectorAll(".plot"));
  const drawn = new Set();
  const shown = new WeakMap(); // heat-map plot -> index of its layer
  const PRINT_WIDTH = 655;
  const PRINT_PAIR_WIDTH = 310;
  let printing = false;

  // ---- drawing -------------------------------------------------------------------------------------------------
  function colour(name) { return getComputedStyle(root).getPropertyValue("--" + name).trim(); }
  function painted(value) {
    if (typeof value === "string") return /^\$[a-z]+\d*$/.test(value) ? colour(value.slice(1)) : value;
    if (Array.isArray(value)) return value.length && typeof value[0] === "number" ? value.slice() : value.map(painted);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, painted(inner)]));
    return value;
  }
  function merged(base, extra) {
    const result = { ...base };
    for (const [key, value] of Object.entries(extra)) {
      result[key] = value && typeof value === "object" && !Array.isArray(value) && base[key] ? merged(base[key], value) : value;
    }
    return result;
  }
  function baseLayout(plot) {
    const narrow = plot.clientWidth < 460;
    const axis = {
      gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), tickcolor: colour("line"),
      tickfont: { color: colour("muted"), size: narrow ? 10 : 11 },
      title: { font: { color: colour("muted"), size: 12 }, standoff: 10 },
    };
    return {
      font: { family: getComputedStyle(document.body).fontFamily, color: colour("ink"), size: 12 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: narrow ? 44 : 56, r: 12, t: 16, b: 40 },
      xaxis: axis, yaxis: axis, hovermode: "closest", dragmode: narrow ? false : "zoom",
      hoverlabel: { bgcolor: colour("ink"), bordercolor: colour("ink"), font: { color: colour("panel"), size: 12.5 }, align: "left" },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: colour("ink"), size: narrow ? 10.5 : 12 } },
      ...(printing ? { width: plot.dataset.heat ? PRINT_PAIR_WIDTH : PRINT_WIDTH, height: plot.dataset.heat ? PRINT_PAIR_WIDTH : 290, autosize: false } : { autosize: true }),
    };
  }
  const CONFIG = { displaylogo: false, responsive: true, displayModeBar: false };

  function chart(plot) {
    const spec = store.figures[plot.dataset.figure];
    const layout = merged(baseLayout(plot), painted(spec.layout));
    // The browser prints before Plotly has made room for a legend of another height: make it beforehand.
    if (printing && layout.xaxis.type !== "category") {
      layout.margin = { l: 72, r: 14, t: 24 + 20 * Math.ceil(spec.data.length / 2), b: 46, autoexpand: false };
    }
    return Plotly.react(plot, painted(spec.data), layout, CONFIG);
  }
  function unpack(packed) {
    const bytes = atob(packed.values);
    return Array.from({ length: packed.side }, (_, i) => Array.from({ length: packed.side }, (_, j) => bytes.charCodeAt(i * packed.side + j) / 100));
  }
  function heat(plot) {
    const map = store.heat[plot.dataset.heat][shown.get(plot) || 0];
    const side = plot.dataset.side, packed = map[side];
    plot.hidden = !packed;
    if (!packed) return Promise.resolve();
    const scale = [[0, colour("heat0")], [0.5, colour("heat1")], [1, colour("heat2")]];
    const what = map.cell > 1 ? "largest |ρ| of " + map.cell + " × " + map.cell + " filters" : "|ρ|";
    const data = [{
      type: "heatmap", z: unpack(packed), zmin: 0, zmax: 1, colorscale: scale, showscale: true,
      colorbar: { thickness: 10, outlinewidth: 0, tickfont: { color: colour("muted"), size: 10 }, len: 0.9 },
      hovertemplate: "filters %{y} and %{x}<br>" + what + ": %{z:.2f}<extra></extra>",
      x0: 0, dx: map.cell, y0: 0, dy: map.cell,
    }];
    const layout = merged(baseLayout(plot), {
      title: { text: side === "before" ? "original" : "pruned", font: { size: 13, color: colour("ink") }, x: 0.5, y: 0.985 },
      margin: { l: 46, r: 8, t: 34, b: 40 },
      xaxis: { title: { text: "filter" }, showgrid: false, zeroline: false, constrain: "domain" },
      yaxis: { title: { text: "filter" }, autorange: "reversed", scaleanchor: "x", showgrid: false, zeroline: false, constrain: "domain" },
    });
    return Plotly.react(plot, data, layout, CONFIG);
  }
  function draw(plot) { drawn.add(plot); return plot.dataset.heat ? heat(plot) : chart(plot); }
  function redraw() { drawn.forEach((plot) => { if (!folded(plot)) draw(plot); }); }

  root.addEventListener("repaint", redraw);
  // What is looked at first is drawn first; the rest while the page is idle.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !drawn.has(entry.target)) { watcher.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "300px" });
  plots.forEach((plot) => watcher.observe(plot));
  const idle = window.requestIdleCallback || ((run) => setTimeout(run, 60));
  const folded = (plot) => plot.closest("details.run:not([open])");
  function rest() {
    const next = plots.find((plot) => !drawn.has(plot) && !folded(plot));
    if (next) { draw(next); idle(rest); } else root.dataset.drawn = "all";
  }
  rest();

  // ---- details of a run are folded where there are several -------------------------------------------------------
  const runs = Array.from(document.querySelectorAll("details.run"));
  runs.forEach((run) => run.addEventListener("toggle", () => {
    if (!run.open || printing) return;
    // What was drawn before has the colours and the width of that time.
    plots.filter((plot) => drawn.has(plot) && run.contains(plot)).forEach(draw);
    root.dataset.drawn = "some";
    rest();
  }));
  function unfold() {
    const place = document.getElementById(location.hash.slice(1));
    const run = place && (place.querySelector(":scope>details.run") || place.closest("details.run"));
    if (run) run.open = true;
  }
  window.addEventListener("hashchange", unfold);
  document.querySelectorAll("nav a").forEach((link) => link.addEventListener("click", () => setTimeout(unfold)));
  unfold();

  document.querySelectorAll("select.heat-layer").forEach((select) => select.addEventListener("change", () => {
    const maps = store.heat[select.dataset.heat], index = Number(select.value);
    select.closest("figure").querySelector(".heat-summary").textContent = maps[index].summary;
    plots.filter((plot) => plot.dataset.heat === select.dataset.heat).forEach((plot) => { shown.set(plot, index); draw(plot); });
  }));

  // ---- arrow keys read a chart point by point --------------------------------------------------------------------
  const cursor = new WeakMap();
  plots.filter((plot) => plot.dataset.figure).forEach((plot) => {
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (event.key === "Escape") { Plotly.Fx.unhover(plot); return; }
      if (!step) return;
      event.preventDefault();
      const traces = store.figures[plot.dataset.figure].data;
      let [series, point] = cursor.get(plot) || [0, -1];
      series = (series + step[0] + traces.length) % traces.length;
      point = Math.max(0, Math.min(traces[series].x.length - 1, point + step[1]));
      cursor.set(plot, [series, point]);
      Plotly.Fx.hover(plot, [{ curveNumber: series, pointNumber: point }]);
      document.getElementById("spoken").textContent = traces[series].customdata[point].replace(/<br>/g, "; ").replace(/<[^>]+>/g, "")
        .replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
    });
    plot.addEventListener("blur", () => { if (drawn.has(plot)) Plotly.Fx.unhover(plot); });
  });

  // ---- print: one column, everything drawn -----------------------------------------------------------------
  let closed = [];
  window.addEventListener("beforeprint", () => {
    printing = true;
    closed = runs.filter((run) => !run.open);
    closed.forEach((run) => { run.open = true; });
    plots.forEach(draw);
  });
  window.addEventListener("afterprint", () => {
    closed.forEach((run) => { run.open = false; });
    printing = false;
    redraw();
  });
})();
