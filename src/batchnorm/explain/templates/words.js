// The sentences that depend on the sliders, chosen and filled in as words.py does it. A text is found by what it says
// when the page opens.
(() => {
  "use strict";

  const report = globalThis.batchnormReport;
  const { draws, texts } = report.data;
  const days = draws.hot.length;
  const parts = 3; // of the season: early, middle, late

  const mean = (values) => report.sum(values) / values.length;
  const own = (runner, values, { members }) =>
    members.flatMap((row, day) => {
      const place = row.indexOf(runner);
      return place < 0 ? [] : [{ day, value: values[day][place] }];
    });

  const ofTheTwo = (found, settings) => {
    const result = { compared: 0 };
    const third = Math.floor(days / parts);
    const heat = found.x.map((row, day) => row.map(() => settings.difference * draws.hot[day]));
    const kinds = { raw: found.x, after: found.y, true: found.form, heat };
    for (const [index, runner] of report.extremes(found).entries()) {
      const name = ["faster", "slower"][index];
      result[`${name}_runs`] = own(runner, found.x, found).length;
      for (const [part, chosen] of [["early", (day) => day < third], ["late", (day) => day >= days - third]]) {
        if (!own(runner, found.x, found).some(({ day }) => chosen(day))) continue;
        result.compared += 1;
        for (const [what, values] of Object.entries(kinds)) {
          const runs = own(runner, values, found).filter(({ day }) => chosen(day));
          result[`${name}_${part}_${what}`] = mean(runs.map(({ value }) => value));
        }
      }
    }
    if (result.compared < 4) return result;
    result.seems = result.faster_late_raw - result.faster_early_raw;
    result.heat_later = result.faster_late_heat - result.faster_early_heat;
    result.falls = result.faster_early_after - result.faster_late_after;
    result.rises = result.slower_late_after - result.slower_early_after;
    return result;
  };

  // The correlation that the same runs would have, had no day been hot.
  const withoutHeat = (found, { difference }) => {
    const times = found.x.map((row, day) => {
      const heat = draws.perDegree * difference * draws.hot[day];
      return row.map((value) => (value - draws.base - heat) / (1 + draws.widening * heat));
    });
    return report.visible(times, found);
  };

  const numbers = (found, settings) => {
    const { difference, trend, runners, gamma, beta } = settings;
    const known = { difference, hot: draws.cool + difference, trend, runners, gamma, beta };
    known.eps = report.small(settings.eps);
    if (found.before !== null) {
      known.before = found.before;
      known.hidden = (withoutHeat(found, settings) ?? 0) - found.before;
    }
    if (found.before !== null && found.after !== null) {
      known.after = found.after;
      known.gain = found.after - found.before;
    }
    const spread = found.var.map(Math.sqrt);
    for (const [kind, name] of ["cool", "hot"].entries()) {
      const these = (values) => values.filter((_, day) => draws.hot[day] === kind);
      known[`${name}_mean`] = mean(these(found.mean));
      known[`${name}_spread`] = mean(these(spread));
    }
    known.widening = known.hot_spread - known.cool_spread;
    const left = found.var.map((value) => Math.sqrt(value / (value + settings.eps)));
    known.spread_low = Math.min(...left);
    known.spread = [...left].sort((a, b) => a - b)[Math.floor((days - 1) / 2)];
    known.spread_high = Math.max(...left);
    return { ...known, ...ofTheTwo(found, settings) };
  };

  const say = (sentences, known) => {
    const holds = ({ when }) => Object.entries(when).every(([name, [low, high]]) => known[name] >= low && known[name] <= high);
    const filled = (text) =>
      text.replace(/\{(\w+)(?::(\d))?\}/g, (_, name, digits) => {
        const value = known[name];
        if (typeof value === "string") return value;
        return digits === undefined ? String(value).replace("-", "−") : report.fixed(value, Number(digits));
      });
    return sentences.map((wordings) => filled(wordings.find(holds).text)).filter(Boolean).join(" ");
  };

  const said = (found, settings) => {
    const known = numbers(found, settings);
    return Object.fromEntries(Object.entries(texts).map(([name, sentences]) => [name, say(sentences, known)]));
  };

  const candidates = [...document.querySelectorAll(".lead, .prose, .caption, .alt, .verdict .text p")];
  const written = new Map(candidates.map((element) => [element, element.textContent.trim()]));
  const start = report.start();
  const opening = said(report.compute(start), start);
  const places = Object.fromEntries(
    Object.entries(opening).map(([name, text]) => [
      name,
      candidates.filter((element) => written.get(element).startsWith(text)),
    ]),
  );
  for (const [name, found] of Object.entries(places)) {
    if (found.length !== 1) console.error(`the text ${name} stands in ${found.length} places`);
  }

  const why = document.querySelector(".meters .why");

  const show = ({ found, settings }) => {
    report.said = said(found, settings);
    why.textContent = found.after === null ? report.said["after-card"] : "";
    for (const [name, text] of Object.entries(report.said)) {
      const [element] = places[name];
      // What follows the text in its element does not depend on anything.
      element.textContent = text + written.get(element).slice(opening[name].length);
      const plot = element.closest(".alt")?.closest(".plot");
      if (plot) plot.setAttribute("aria-label", `${plot.closest("figure").querySelector("figcaption").textContent}. ${text}`);
    }
  };

  document.addEventListener("season", ({ detail }) => show(detail));
  show({ found: report.season, settings: report.settings() });
})();
