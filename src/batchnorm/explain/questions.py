"""Six questions: predict, then see. `settings` are values on the sliders' own scales."""

from batchnorm.report.document import Question

__all__ = ["questions"]


_QUESTIONS = (
    Question(
        "cool",
        "1. No heat at all: the temperature difference goes to 0. How well do raw times now tell who improves?",
        ("As badly as before", "Almost perfectly", "Worse than before"),
        1,
        "The heat was all that stood in the way. Batch norm has nothing to take off here and even costs a little, "
        "because a day's mean also depends on who happened to come.",
        {"difference": 0},
    ),
    Question(
        "heat",
        "2. Hot days become 25 °C hotter than cool ones. What happens to the normalized times?",
        ("They get as confusing as the raw ones", "They get a little worse", "Nothing"),
        2,
        "Heat moves and stretches all times of a day alike. The mean takes off the one, σ the other, however "
        "large they are.",
        {"difference": 25},
    ),
    Question(
        "pair",
        "3. Only two runners come each day. What are their normalized times?",
        ("−1 and +1, every day", "Closer to the true form", "Both 0"),
        0,
        "Two values always lie one σ on either side of their mean. How far apart they were is lost, and who one "
        "was paired with decides: the smaller the batch, the noisier its mean and variance.",
        {"runners": 2},
    ),
    Question(
        "eps",
        "4. ε goes to 1000 s², far above any day's variance. What happens to the normalized times?",
        ("They grow", "They shrink towards 0", "Their mean moves away from 0"),
        1,
        "ε stands beside the variance under the root, so a large one divides by too much. It is there to keep the "
        "division safe when σ is 0, and should be small beside the variance.",
        {"eps": 3},
    ),
    Question(
        "scale",
        "5. γ goes from 3 to 6, β from 90 to 80. Does the coach see more of each runner's form?",
        ("Yes, twice as much", "Less, because β is lower", "Just as much, on another scale"),
        2,
        "γ and β change the unit and nothing else. Only γ = 0 would wipe everything out: try it.",
        {"gamma": 6, "beta": 80},
    ),
    Question(
        "weather",
        "6. Someone sees the normalized times only. Can they tell which days were hot?",
        (
            "Yes, hot days are higher",
            "Only if the heat is great",
            "No, every day has mean 0 and spread 1",
        ),
        2,
        "That is what was taken away. Whoever wanted to learn about the weather has lost it, and so has a network "
        "that is shown one day per batch: the bikes above.",
        {"difference": 25},
    ),
)


def questions() -> list[Question]:
    """Return the questions of the page's end, in an order that builds up.

    Example:
        >>> len(questions())
        6
    """
    return list(_QUESTIONS)
