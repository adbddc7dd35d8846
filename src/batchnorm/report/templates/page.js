(() => {
  "use strict";

  const root = document.documentElement;
  const names = ["with", "without", "muted", "ink", "with-band", "without-band", "muted-band", "ink-band"];
  const narrow = matchMedia("(max-width: 40rem)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");

  const palette = () => {
    const style = getComputedStyle(root);
    const read = (name) => style.getPropertyValue(`--${name}`).trim();
    const extra = ["surface", "rule", "grid", "sans"];
    return Object.fromEntries([...names, ...extra].map((name) => [name, read(name)]));
  };

  // Colour names stand only under keys that speak of colour, so a trace may be called "with".
  const themed = (value, colours, key = "") => {
    if (Array.isArray(value)) return value.map((item) => themed(item, colours, key));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, colours, k)]));
    }
    const named = typeof value === "string" && /color/i.test(key) && names.includes(value);
    return named ? colours[value] : value;
  };

  const merged = (base, over) => {
    const result = { ...base };
    for (const [key, value] of Object.entries(over)) {
      const both = [result[key], value].every((v) => v && typeof v === "object" && !Array.isArray(v));
      result[key] = both ? merged(result[key], value) : value;
    }
    return result;
  };

  const axis = (spec, colours) => {
    const own = typeof spec?.title === "string" ? { ...spec, title: { text: spec.title } } : (spec ?? {});
    const base = {
      automargin: true,
      gridcolor: colours.grid,
      linecolor: colours.rule,
      tickcolor: colours.rule,
      zerolinecolor: colours.rule,
      tickfont: { color: colours.muted },
      title: { standoff: 10, font: { color: colours.muted, size: narrow.matches ? 12 : 13 } },
    };
    // Left alone, Plotly labels a log axis 2, 5, 0.01, 2, 5, ...
    if (own.type === "log" && !own.tickvals) base.dtick = 1;
    return merged(base, own);
  };

  const layoutOf = (spec, colours, height) => {
    const base = {
      autosize: true, // to the canvas, whose height the style sheet takes from --plot-height
      uirevision: "reader",
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      colorway: [colours.with, colours.without, colours.muted],
      font: { family: colours.sans, size: narrow.matches ? 11 : 13, color: colours.ink },
      margin: { l: 48, r: 20, t: 12, b: 44 },
      legend: {
        orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", bgcolor: "rgba(0,0,0,0)",
        // A phone's reader scrolls over the legend; a tap that hides a curve would only surprise.
        itemclick: coarse.matches ? false : "toggle",
      },
      hoverlabel: { bgcolor: colours.surface, bordercolor: colours.rule, font: { color: colours.ink } },
      dragmode: coarse.matches ? false : "zoom",
    };
    const layout = merged(base, spec);
    delete layout.title; // It stands above the plot, as text of the page.
    for (const key of new Set(["xaxis", "yaxis", ...Object.keys(layout).filter((k) => /^[xy]axis\d*$/.test(k))])) {
      layout[key] = axis(layout[key], colours);
    }
    delete layout.height;
    const grid = layout.grid;
    if (narrow.matches && grid?.pattern === "independent" && grid.columns > 1) {
      layout.grid = { ...grid, rows: grid.rows * grid.columns, columns: 1 };
      return [layout, Math.round(height * grid.columns * 0.85)];
    }
    return [layout, height];
  };

  const config = { responsive: true, displayModeBar: false, displaylogo: false, showLink: false, scrollZoom: false };

  const draw = async (plot) => {
    const canvas = plot.querySelector(".canvas");
    const spec = JSON.parse(document.getElementById(`${plot.id}-spec`).textContent);
    const colours = palette();
    const [layout, height] = layoutOf(themed(spec.layout, colours), colours, Number(plot.dataset.height));
    try {
      plot.style.setProperty("--plot-height", `${height}px`);
      plot.classList.add("drawn");
      await Plotly.react(canvas, themed(spec.data, colours), layout, config);
    } catch (error) {
      plot.classList.remove("drawn");
      plot.classList.add("failed");
      console.error(`figure ${plot.id} could not be drawn`, error);
    }
  };

  const plots = [...document.querySelectorAll(".plot")];
  // A plot inside a closed section has no width yet; it is drawn when the section opens.
  const drawVisible = () => plots.filter((plot) => !plot.closest("details:not([open])")).map(draw);

  if (plots.length && typeof Plotly === "undefined") plots.forEach((plot) => plot.classList.add("failed"));
  else {
    drawVisible();
    dark.addEventListener("change", drawVisible);
    narrow.addEventListener("change", drawVisible);
    for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", drawVisible);
  }

  // A figure out of sight keeps its new data and is drawn when it comes near: so a slider moves without a jerk.
  const near = new Set();
  const stale = new Set();
  const drawStale = (plot) => {
    const hidden = plot.closest("details:not([open])") || plot.classList.contains("failed");
    if (near.has(plot) && !hidden && stale.delete(plot)) draw(plot);
  };
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) near.add(target);
      else near.delete(target);
      drawStale(target);
    }
  }, { rootMargin: "30%" });

  // For scripts of a page's own: new data for a figure, in the order of its traces, whatever the theme.
  globalThis.batchnormReport = {
    get data() { return JSON.parse(document.getElementById("report-data").textContent); },
    redraw: (id, traces) => {
      const plot = document.getElementById(`figure-${id}`);
      const holder = document.getElementById(`${plot.id}-spec`);
      const spec = JSON.parse(holder.textContent);
      traces.forEach((trace, index) => Object.assign(spec.data[index], trace));
      holder.textContent = JSON.stringify(spec);
      if (typeof Plotly === "undefined") return;
      stale.add(plot);
      watcher.observe(plot);
      drawStale(plot);
    },
  };

  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((details) => { details.open = true; });
    root.toggleAttribute("data-print", true);
    drawVisible();
  });
  addEventListener("afterprint", () => {
    closed.forEach((details) => { details.open = false; });
    root.toggleAttribute("data-print", false);
    drawVisible();
  });

  const download = document.getElementById("download");
  if (download) {
    download.hidden = false;
    download.addEventListener("click", () => {
      const text = JSON.stringify(JSON.parse(document.getElementById("report-data").textContent), null, 2);
      const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      const link = Object.assign(document.createElement("a"), { href: url, download: "batchnorm-report.json" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(url), 1000);
    });
  }
})();
