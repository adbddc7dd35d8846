// Sliders and questions: their values, their words, and two events that a page's own script may hear.
(() => {
  "use strict";

  const report = globalThis.batchnormReport;
  const sliders = [...document.querySelectorAll(".slider input")];
  const narrow = matchMedia("(max-width: 64rem)");

  const scaled = (input, value) => (input.dataset.log === undefined ? Number(value) : 10 ** Number(value));
  const valueOf = (input) => scaled(input, input.value);

  const textOf = (input) => {
    const value = valueOf(input);
    const fixed = value.toFixed(Number(input.dataset.digits));
    const number = input.dataset.log === undefined ? fixed : String(Number(value.toPrecision(2)));
    return `${number} ${input.dataset.unit}`.trim();
  };

  const show = (input) => {
    const text = textOf(input);
    document.getElementById(`${input.id}-value`).textContent = text;
    input.setAttribute("aria-valuetext", text);
  };

  report.settings = () => Object.fromEntries(sliders.map((input) => [input.name, valueOf(input)]));
  // What they were when the page opened: what a question's answer is compared with.
  report.start = () => Object.fromEntries(sliders.map((input) => [input.name, scaled(input, input.defaultValue)]));
  report.tell = (name, detail) => document.dispatchEvent(new CustomEvent(name, { detail }));
  // Values on the slider's own scale: exponents where it is logarithmic.
  report.set = (values) => {
    for (const [name, value] of Object.entries(values)) {
      const input = document.getElementById(`slider-${name}`);
      input.value = value;
      show(input);
    }
    report.tell("settings", report.settings());
  };
  const start = () => Object.fromEntries(sliders.map((input) => [input.name, Number(input.defaultValue)]));

  for (const input of sliders) {
    input.addEventListener("input", () => {
      show(input);
      report.tell("settings", report.settings());
    });
  }
  for (const button of document.querySelectorAll(".controls .reset")) {
    button.addEventListener("click", () => report.set(start()));
  }

  const fold = () => {
    for (const details of document.querySelectorAll(".controls details")) details.open = !narrow.matches;
  };
  fold();
  narrow.addEventListener("change", fold);

  for (const question of document.querySelectorAll(".question")) {
    const button = question.querySelector(".see");
    question.addEventListener("change", () => { button.disabled = false; });
    button.addEventListener("click", () => {
      const chosen = Number(question.querySelector("input:checked").value);
      const right = chosen === Number(question.dataset.answer);
      const settings = JSON.parse(question.dataset.settings);
      if (Object.keys(settings).length) report.set({ ...start(), ...settings });
      question.classList.toggle("right", right);
      question.classList.toggle("wrong", !right);
      question.querySelector(".outcome").textContent = right ? "You saw it coming." : "It comes out otherwise.";
      report.tell("question", { question, before: report.start(), right });
      question.querySelector(".seen").hidden = false;
    });
  }
})();
