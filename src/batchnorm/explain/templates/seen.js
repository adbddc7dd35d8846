// What an answered question is about, inside the question: two small pictures, and their numbers in a table.
(() => {
  "use strict";

  const report = globalThis.batchnormReport;
  const { draws, shown } = report.data;
  const names = { x: "raw times (s)", xhat: "normalized times", y: "after γ and β" };
  const [width, height, left, top] = [320, 150, 34, 8];

  const element = (name, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  };

  const picture = ({ found, what, title }, [low, high]) => {
    const x = (day) => left + ((day + 1) / (draws.hot.length + 1)) * (width - left);
    const y = (value) => top + (1 - (value - low) / (high - low)) * (height - 2 * top);
    const at = (day, value) => `${x(day).toFixed(1)} ${y(value).toFixed(1)}`;
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}, by day` });
    const dots = (kind) =>
      found[what].flatMap((row, day) => (draws.hot[day] === kind ? row.map((value) => `M${at(day, value)}h0`) : []));
    const [runner] = report.extremes(found);
    const own = found.members.flatMap((row, day) => {
      const place = row.indexOf(runner);
      return place < 0 ? [] : [at(day, found[what][day][place])];
    });
    const digits = high - low < 20 ? 1 : 0;
    svg.append(
      element("text", { x: left - 6, y: y(high) + 8, class: "end" }, report.fixed(high, digits)),
      element("text", { x: left - 6, y: y(low), class: "end" }, report.fixed(low, digits)),
      element("path", { d: `M${left} ${top}V${height - top}H${width}`, class: "frame" }),
      element("path", { d: dots(0).join(""), class: "cool" }),
      element("path", { d: dots(1).join(""), class: "hot" }),
      element("path", { d: `M${own.join("L")}`, class: "own" }),
    );
    return svg;
  };

  const numbers = ({ found, what }) => {
    const values = found[what];
    const mean = (list) => report.sum(list) / list.length;
    const spread = (list) => Math.sqrt(mean(list.map((value) => (value - mean(list)) ** 2)));
    const two = (value) => report.fixed(value, 2);
    const days = (measure) =>
      [0, 1].map((kind) => two(mean(values.filter((_, day) => draws.hot[day] === kind).map(measure)))).join(" / ");
    const flat = values.flat();
    const correlation = what === "x" ? found.before : found.after;
    return [
      ["a day's mean, cool / hot", days(mean)],
      ["a day's spread, cool / hot", days(spread)],
      ["lowest / highest", `${two(Math.min(...flat))} / ${two(Math.max(...flat))}`],
      ["correlation with the form", correlation === null ? "none" : two(correlation)],
    ];
  };

  const table = (panels) => {
    const made = document.createElement("table");
    const row = (cells, names) => {
      const line = made.insertRow();
      cells.forEach((text, index) => {
        const cell = document.createElement(names[Math.min(index, 1)]);
        if (cell.tagName === "TH") cell.scope = index ? "col" : "row";
        cell.textContent = text;
        line.append(cell);
      });
    };
    const told = panels[0].what === panels[1].what ? "at" : "name";
    row(["", ...panels.map((panel) => panel[told])], ["td", "th"]);
    const [first, second] = panels.map(numbers);
    first.forEach(([name, value], index) => row([name, value, second[index][1]], ["th", "td"]));
    return made;
  };

  // The settings in words: labels and values as the sliders show them.
  const inWords = (question) =>
    Object.keys(JSON.parse(question.dataset.settings))
      .map((name) => {
        const value = document.getElementById(`slider-${name}-value`).textContent;
        const label = document.querySelector(`label[for=slider-${name}]`).textContent.split(",")[0];
        return `${label[0].toLowerCase()}${label.slice(1)} ${value}`;
      })
      .join(", ");

  const range = (panels) => {
    const all = panels.flatMap(({ found, what }) => found[what].flat());
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const room = 0.04 * (high - low) || 1;
    return [low - room, high + room];
  };

  document.addEventListener("question", ({ detail: { question, before } }) => {
    const seasons = { start: report.compute(before), asked: report.season };
    const labels = { start: "as the page opens", asked: inWords(question) };
    const panels = shown[question.id.replace("question-", "")].map(([at, what]) => ({
      found: seasons[at],
      what,
      at: labels[at],
      name: names[what],
      title: `${names[what]}, ${labels[at]}`,
    }));
    const together = panels[0].what === panels[1].what;
    const box = document.createElement("div");
    box.className = "compared";
    const pictures = document.createElement("div");
    pictures.className = "pictures";
    for (const panel of panels) {
      const figure = document.createElement("div");
      const title = document.createElement("p");
      title.textContent = panel.title;
      figure.append(title, picture(panel, range(together ? panels : [panel])));
      pictures.append(figure);
    }
    const key = document.createElement("p");
    key.className = "key";
    key.innerHTML = '<span class="cool"></span>cool day <span class="hot"></span>hot day <span class="own"></span>one runner';
    box.append(pictures, key, table(panels));
    const seen = question.querySelector(".seen");
    seen.querySelector(".compared")?.remove();
    seen.append(box);
  });
})();
