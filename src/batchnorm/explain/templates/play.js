// The season, computed in the browser as runners.py computes it in the library, and everything that shows it.
(() => {
  "use strict";

  const report = globalThis.batchnormReport;
  const data = report.data;
  const draws = data.draws;
  const days = draws.hot.length;

  const sum = (values) => values.reduce((total, value) => total + value, 0);

  // The four steps on one batch.
  const fourSteps = (x, { eps, gamma, beta }) => {
    const mean = sum(x) / x.length;
    const variance = sum(x.map((value) => (value - mean) ** 2)) / x.length;
    const xhat = x.map((value) => (value - mean) / Math.sqrt(variance + eps));
    return { mean, var: variance, xhat, y: xhat.map((value) => gamma * value + beta) };
  };

  const season = (settings) => {
    const found = { members: [], form: [], x: [], mean: [], var: [], xhat: [], y: [] };
    for (let day = 0; day < days; day += 1) {
      const members = draws.order[day].slice(0, settings.runners);
      const heat = draws.perDegree * settings.difference * draws.hot[day];
      const form = members.map(
        (runner) => draws.level[runner] + settings.trend * draws.pace[runner] * (day - (days - 1) / 2),
      );
      const x = members.map(
        (runner, place) =>
          draws.base + heat + (1 + draws.widening * heat) * (form[place] + draws.noiseScale * draws.noise[day][runner]),
      );
      const steps = { members, form, x, ...fourSteps(x, settings) };
      for (const name of Object.keys(found)) found[name].push(steps[name]);
    }
    found.before = visible(found.x, found);
    found.after = visible(found.y, found);
    return found;
  };

  // The correlation with the true form, each run less its runner's own average; null where nothing changes.
  const visible = (values, { form, members }) => {
    const who = members.flat();
    const lessOwnAverage = (table) => {
      const flat = table.flat();
      const totals = draws.level.map(() => [0, 0]);
      flat.forEach((value, index) => {
        totals[who[index]][0] += value;
        totals[who[index]][1] += 1;
      });
      return flat.map((value, index) => value - totals[who[index]][0] / totals[who[index]][1]);
    };
    const [a, b] = [lessOwnAverage(values), lessOwnAverage(form)];
    const scale = Math.sqrt(sum(a.map((value) => value * value)) * sum(b.map((value) => value * value)));
    return scale < 1e-9 ? null : sum(a.map((value, index) => value * b[index])) / scale;
  };

  // --- Words

  const fixed = (value, digits) => value.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");
  const two = (value) => fixed(value, 2);
  // ε as its slider writes it.
  const small = (eps) => String(Number(eps.toPrecision(2)));
  const listed = (texts, joint) =>
    (texts.length > 5 ? [texts[0], texts[1], "…", texts.at(-1)] : texts).join(joint);
  const bracket = (text) => (text.startsWith("−") ? `(${text})` : text);

  const formulas = (found, { eps, gamma, beta }) => {
    const day = data.worked_day;
    const [mean, variance] = [two(found.mean[day]), two(found.var[day])];
    const texts = found.x[day].map(two);
    const squares = texts.map((text) => `(${text} − ${bracket(mean)})²`);
    const [xhat, y] = [two(found.xhat[day][0]), two(found.y[day][0])];
    return {
      mean: `(${listed(texts.map(bracket), " + ")}) / ${texts.length} = ${mean}`,
      variance: `(${listed(squares, " + ")}) / ${texts.length} = ${variance}`,
      normalize: `first value: (${texts[0]} − ${bracket(mean)}) / √(${variance} + ${small(eps)}) = ${xhat}`,
      scale: `first value: ${two(gamma)} · ${bracket(xhat)} + ${bracket(two(beta))} = ${y}`,
    };
  };

  const showFormulas = (found, settings) => {
    for (const [id, text] of Object.entries(formulas(found, settings))) {
      document.querySelector(`#formula-${id} .numbers`).textContent = text;
    }
  };

  // --- Pictures: new numbers for the traces of figures.py, in their order

  const dots = (values, kind) => {
    const trace = { x: [], y: [] };
    values.forEach((row, day) => {
      if (kind !== undefined && draws.hot[day] !== kind) return;
      trace.x.push(...row.map(() => day + 1));
      trace.y.push(...row);
    });
    return trace;
  };

  const runner = (number, values, members) => {
    const trace = { x: [], y: [] };
    members.forEach((row, day) => {
      const place = row.indexOf(number);
      if (place < 0) return;
      trace.x.push(day + 1);
      trace.y.push(values[day][place]);
    });
    return trace;
  };

  const everyDay = (y) => ({ x: y.map((_, day) => day + 1), y });

  // Those whose form improves and declines most, of the runners who came often enough for a line.
  const extremes = ({ members }) => {
    const runs = draws.level.map(() => 0);
    for (const who of members.flat()) runs[who] += 1;
    const often = [...runs.keys()].filter((who) => runs[who] >= draws.lineFrom);
    const first = (better) => often.reduce((best, who) => (better(draws.pace[who], draws.pace[best]) ? who : best));
    return [first((a, b) => a < b), first((a, b) => a > b)];
  };

  const showPictures = (found, settings) => {
    const [faster, slower] = extremes(found);
    const hot = settings.difference > 0 ? "hot day" : "hot day, now as cool";
    const kinds = (values) => [
      dots(values, 0),
      { ...dots(values, 1), name: hot },
      runner(faster, values, found.members),
    ];
    const spread = found.var.map(Math.sqrt);
    const deviations = found.x.map((row, day) => row.map((value) => value - found.mean[day]));
    const names = settings.trend > 0 ? ["gets faster", "gets slower"] : ["one runner", "another"];
    const pair = (values) =>
      [faster, slower].map((number, index) => ({ ...runner(number, values, found.members), name: names[index] }));
    report.redraw("raw", kinds(found.x));
    report.redraw("mean", [dots(found.x), everyDay(found.mean)]);
    report.redraw("variance", [dots(deviations), everyDay(spread), everyDay(spread.map((value) => -value))]);
    report.redraw("normalize", kinds(found.xhat));
    report.redraw("scale", kinds(found.y));
    report.redraw("trend", [found.x, found.y, found.form].flatMap(pair));
  };

  // --- The two correlations: as cards on the first screen, as bars beside the sliders

  const headlines = document.querySelectorAll("#raw-times .verdict .headline");

  const meter = (label, tone) => {
    const row = document.createElement("div");
    row.className = `meter ${tone}`;
    row.innerHTML = '<span class="name"></span><span class="value"></span><span class="bar"><span></span></span>';
    row.querySelector(".name").textContent = label;
    return row;
  };
  const panel = document.createElement("div");
  panel.className = "meters";
  const meters = { before: meter("raw times", "bad"), after: meter("after batch norm", "good") };
  const heading = document.createElement("p");
  heading.textContent = "What they tell of each runner's form (correlation with the truth)";
  heading.className = "heading";
  const why = document.createElement("p");
  why.className = "why";
  panel.append(heading, meters.before, meters.after, why);
  document.querySelector(".controls").prepend(panel);

  const showCorrelations = (found) => {
    for (const [index, name] of ["before", "after"].entries()) {
      const value = found[name];
      headlines[index].textContent = value === null ? "no correlation" : `correlation ${two(value)}`;
      meters[name].querySelector(".value").textContent = value === null ? "none" : two(value);
      meters[name].querySelector(".bar span").style.width = `${100 * Math.max(0, value ?? 0)}%`;
    }
  };

  // --- Live

  let waiting = false;
  const show = (settings) => {
    const found = season(settings);
    // The console may ask, and so do the tests and the scripts that follow.
    report.season = found;
    showCorrelations(found);
    showFormulas(found, settings);
    report.tell("season", { found, settings });
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      showPictures(report.season, report.settings());
    });
  };

  Object.assign(report, { compute: season, extremes, fixed, small, sum, visible });
  document.addEventListener("settings", ({ detail }) => show(detail));
  show(report.settings());
})();
