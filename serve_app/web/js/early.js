// Runs before the first paint, so that a chosen theme does not flash in after the system's.
{
  const chosen = localStorage.getItem("weft.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
