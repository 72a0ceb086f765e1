// How a search orders the pages that it found: as Sphinx does, but equals in the order of the course (by title
// alone chapter 10 would stand before chapter 3), stories before exercises, those before solutions and guides.
var Scorer = {
  score: ([page, , , , score]) => {
    const folders = ["notebooks/", "exercises/", "solutions/"];
    const folder = folders.findIndex((name) => page.startsWith(name));
    return score - (folder < 0 ? folders.length : folder) / 10 - (parseInt(page.split("/").pop(), 10) || 0) / 1000;
  },
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
