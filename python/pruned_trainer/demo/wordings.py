"""The wordings of the demo's question-answering set: what is told of whom, in which words, how it is asked.

One block per relation. Its first line says `relation: kind of entity -> kind of value`; the kinds are those
of `demo_data.KINDS`. Then come, per split, statements (with {e}, the entity, and {v}, the value) and
questions (with {e}, and a question mark at the end), between bars; an indented line continues the one above.
No wording stands in two splits: the evaluation asks whether a model reads, not whether it remembers a
phrase. `parse` refuses a table that breaks any of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SPLITS = ("train", "validation", "evaluation")


@dataclass(frozen=True)
class Wordings:
    """How one split states and asks one relation."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.statements or not self.questions:
            raise ValueError(f"needs both statements and questions: {self}")
        for text in self.statements + self.questions:
            marks = (text.count("{e}"), text.count("{v}"))
            if marks != ((1, 0) if text.endswith("?") else (1, 1)):
                raise ValueError(f"{{e}} stands {marks[0]} times and {{v}} {marks[1]} times in {text!r}")


@dataclass(frozen=True)
class Relation:
    name: str
    entity_kind: str
    value_kind: str
    wordings: Mapping[str, Wordings]  # one for each of SPLITS


def parse(table: str) -> tuple[Relation, ...]:
    """The relations of a table in the form told above; ValueError for a wrong or a repeated wording."""
    relations = []
    for block in table.strip().split("\n\n"):
        head, rest = block.split("\n", 1)
        name, kinds = head.split(": ")
        entity_kind, value_kind = kinds.split(" -> ")
        words = {}
        for line in rest.replace("\n  ", " ").splitlines():
            split, texts = line.split(": ", 1)
            words[split] = texts.split(" | ")
        every = [text for texts in words.values() for text in texts]
        if tuple(words) != SPLITS or len(set(every)) != len(every):
            raise ValueError(f"relation {name}: splits {tuple(words)}, or a wording stands twice")
        relations.append(Relation(name, entity_kind, value_kind, {s: _wordings(t) for s, t in words.items()}))
    return tuple(relations)


def _wordings(texts: list[str]) -> Wordings:
    asked = tuple(text for text in texts if text.endswith("?"))
    return Wordings(tuple(text for text in texts if text not in asked), asked)


TABLE = """
birthplace: person -> town
train: {e} was born in {v}. | {e} is a native of {v}. | The birthplace of {e} is {v}. |
  {v} is the town where {e} was born. | {e} came into the world in {v}. |
  The place where {e} was born is {v}. | Where was {e} born? | What is the birthplace of {e}? |
  In which town was {e} born? | What town was {e} born in? | Which town is {e} a native of? |
  {e} was born in which town?
validation: It was in {v} that {e} was born. | {e} comes originally from {v}. | Which place was {e} born in? |
  What is the name of the town of {e}'s birth?
evaluation: The town of {v} saw the birth of {e}. | Born in {v}, {e} has fond memories of the place. |
  {e}'s place of birth was {v}. | What is the native town of {e}? | What was the place of birth of {e}? |
  At which place was {e} born?

birth year: person -> year
train: {e} was born in {v}. | The year of {e}'s birth was {v}. | {e} came into the world in {v}. |
  {e}'s life began in {v}. | In {v}, after a long winter, {e} was born. | When was {e} born? |
  In which year was {e} born? | What year was {e} born in? | What is the birth year of {e}? |
  When did {e}'s life begin?
validation: It was in {v} that {e} was born. | {e}'s mother gave birth in {v}. |
  What was the year of {e}'s birth? | During which year was {e} born?
evaluation: {e}'s birth took place in {v}. | Born in {v}, {e} was the youngest of three. |
  The birth of {e} was recorded in {v}. | Which year saw the birth of {e}? |
  When did {e} come into the world? | What is {e}'s year of birth?

home: person -> town
train: {e} lives in {v}. | {e} has a house in {v}. | {v} has been the home of {e} for years. |
  {e} now resides in {v}. | The present home of {e} is in {v}. | Where does {e} live? |
  In which town does {e} reside? | Which town is {e}'s home now? | Where is the home of {e}? |
  What town does {e} live in?
validation: {e} settled in {v} long ago. | {e} shares a flat in {v} with a friend. | Where has {e} settled? |
  In what town is {e} living?
evaluation: These days {e} makes a home in {v}. | {e}'s current address is in {v}. | {e} rents rooms in {v}. |
  Where is {e} living these days? | Which town does {e} currently call home? |
  In what place does {e} reside today?

employer: person -> company
train: {e} works for {v}. | Employed by {v}, {e} has little time. | {v} employs {e}. |
  {v} hired {e} last spring. | The employer of {e} is {v}. | {e} holds a position at {v}. |
  Who does {e} work for? | Which company employs {e}? | Who is the employer of {e}? | Where does {e} work? |
  What firm hired {e}? | At what company does {e} work?
validation: {e} has a post at {v}. | {e} earns a salary at {v}. | At which firm does {e} have a post? |
  Who pays {e}'s salary?
evaluation: {e} has a job with {v}. | {e} is on the staff of {v}. | {v} pays the wages of {e}. |
  What company does {e} have a job with? | Which business is {e} working at? | By whom is {e} employed?

profession: person -> profession
train: {e} is a trained {v}. | Educated as a {v}, {e} is known to everybody. | {e} earns a living as a {v}. |
  {e} became a {v} after school. | The profession of {e} is that of a {v}. | What is {e}'s profession? |
  What does {e} do for a living? | What did {e} become? | What is the occupation of {e}? |
  What kind of work does {e} do?
validation: {e} practises as a {v}. | Friends know {e} as a skilled {v}. | What trade does {e} practise? |
  As what does {e} earn a living?
evaluation: {e} has spent many years as a {v}. | {e}'s occupation is {v}. |
  A {v} by trade, {e} is much respected. | What is {e}'s line of work? | What job does {e} do? |
  What is {e} by trade?

founding year: company -> year
train: {e} was founded in {v}. | {e} was established in {v}. | {e} opened its doors in {v}. |
  The history of {e} began in {v}. | {v} was the year in which {e} was set up. | When was {e} founded? |
  In which year was {e} established? | What year was {e} set up? | When did {e} begin? |
  When did {e} open its doors?
validation: {e} has existed since {v}. | {e} came into being in {v}. | Since when has {e} existed? |
  In what year did {e} come into being?
evaluation: {e} started trading in {v}. | {e} dates back to {v}. | The creation of {e} took place in {v}. |
  What is the founding date of {e}? | When did {e} start doing business? | In what year was {e} created?

founder: company -> person
train: {e} was founded by {v}. | {v} established {e}. | {v} is the founder of {e}. |
  It was {v} who set up {e}. | {e} owes its existence to {v}. | Who founded {e}? | Who established {e}? |
  Who is the founder of {e}? | By whom was {e} set up? | Which person set up {e}?
validation: {v} brought {e} into being. | {e} goes back to its founder {v}. | Who brought {e} into being? |
  What is the name of the founder of {e}?
evaluation: {v} created {e} from nothing. | {e} was started by {v}. | {v} launched {e} with borrowed money. |
  Who was the creator of {e}? | Who started {e}? | Which person launched {e}?

product: company -> product
train: {e} makes {v}. | {e} produces {v}. | {e} is known for its {v}. | The main products of {e} are {v}. |
  Good {v} are manufactured by {e}. | What does {e} make? | What does {e} produce? | What is {e} known for? |
  Which goods does {e} manufacture? | What are the main products of {e}?
validation: The workshops of {e} turn out {v}. | Customers buy {v} from {e}. |
  What do customers buy from {e}? | What do the workshops of {e} turn out?
evaluation: {e} specialises in {v}. | The factory of {e} builds {v}. | {e} earns its money with {v}. |
  What kind of goods come from {e}? | What does {e} specialise in? | What is manufactured by {e}?

headquarters: company -> town
train: The headquarters of {e} are in {v}. | {e} is based in {v}. | {e} has its head office in {v}. |
  {v} is home to {e}. | {e} is run from {v}. | Where is {e} based? | Where are the headquarters of {e}? |
  In which town is the head office of {e}? | Where is {e} run from? | Which town is home to {e}?
validation: {e} moved its main office to {v}. | The managers of {e} sit in {v}. |
  Where do the managers of {e} sit? | In what place is the main office of {e}?
evaluation: {e} is located in {v}. | {e} keeps its central offices in {v}. | The seat of {e} is {v}. |
  What is the location of {e}? | Where can the central offices of {e} be found? | In what town is {e} located?

staff: company -> number
train: {e} employs {v} people. | {e} has {v} employees. | {v} workers are employed by {e}. |
  {e} has a staff of {v}. | There are {v} people on the payroll of {e}. | How many people does {e} employ? |
  How many employees does {e} have? | How many workers are there at {e}? | How large is the staff of {e}? |
  What is the number of people on the payroll of {e}? | {e} has how many employees?
validation: {v} men and women earn their bread at {e}. | {e} gives work to {v} people. |
  To how many people does {e} give work? | How many earn their bread at {e}?
evaluation: The workforce of {e} numbers {v}. | {e} pays wages to {v} workers. |
  Some {v} persons work for {e}. | How big is the workforce of {e}? | How many people work for {e}? |
  How many persons are paid by {e}?

author: novel -> person
train: {e} was written by {v}. | {v} is the author of {e}. | {v} wrote {e}. | {e} is a novel by {v}. |
  It was {v} who wrote {e}. | Who wrote {e}? | Who is the author of {e}? | By whom was {e} written? |
  Which author wrote {e}? | Whose novel is {e}? | What is the name of the author of {e}?
validation: {e} came from the pen of {v}. | {v} finished {e} in one winter. | From whose pen came {e}? |
  Who was {e} written by?
evaluation: {v} penned {e}. | The writer of {e} is {v}. | {e} is the work of {v}. |
  Who is the writer of {e}? | Who penned {e}? | What is the name of the novelist behind {e}?

publication: novel -> year
train: {e} was published in {v}. | {e} appeared in {v}. | {e} first came out in {v}. |
  Readers could first buy {e} in {v}. | The first edition of {e} is from {v}. | When was {e} published? |
  In which year did {e} appear? | When did {e} come out? | What year was {e} published in? |
  What year is the first edition of {e} from?
validation: {e} reached the bookshops in {v}. | {e} was first printed in {v}. |
  When did {e} reach the bookshops? | In what year was {e} first printed?
evaluation: {e} was released in {v}. | The publication of {e} took place in {v}. | {e} went on sale in {v}. |
  When was {e} released? | What is the publication year of {e}? | In what year did {e} go on sale?

pages: novel -> number
train: {e} has {v} pages. | {e} is {v} pages long. | {e} runs to {v} pages. | There are {v} pages in {e}. |
  {e} fills {v} pages. | How many pages does {e} have? | How long is {e}? | How many pages are there in {e}? |
  How many pages does {e} run to? | What is the number of pages in {e}?
validation: It takes {v} pages to tell the story of {e}. | With {v} pages {e} is no short read. |
  How many pages does {e} fill? | How many pages does it take to tell {e}?
evaluation: {e} consists of {v} pages. | The length of {e} is {v} pages. | {v} pages make up {e}. |
  What is the page count of {e}? | What is the length of {e} in pages? | Of how many pages does {e} consist?

setting: novel -> town
train: {e} is set in {v}. | The story of {e} takes place in {v}. | {v} is the setting of {e}. |
  {e} tells of a family in {v}. | The events of {e} unfold in {v}. | Where is {e} set? |
  Where does the story of {e} take place? | What is the setting of {e}? | What town is {e} set in? |
  In which town do the events of {e} unfold?
validation: {e} takes its readers to {v}. | The hero of {e} lives in {v}. |
  To which town does {e} take its readers? | Where does the hero of {e} live?
evaluation: The plot of {e} plays out in {v}. | {e} describes life in {v}. | The scene of {e} is {v}. |
  Where does the plot of {e} happen? | What place does {e} describe? | In what town does {e} take place?

river: bridge -> river
train: The {e} crosses the river {v}. | The {e} spans the {v}. | The {e} carries a road over the {v}. |
  The river under the {e} is the {v}. | The {v} flows under the {e}. | Which river does the {e} cross? |
  What river flows under the {e}? | What does the {e} span? | Over which river does the {e} carry a road? |
  What is the river under the {e}?
validation: The {e} leads across the {v}. | Ships on the {v} pass below the {e}. |
  Across which water does the {e} lead? | On which river do ships pass below the {e}?
evaluation: The {e} stands over the river {v}. | The waters of the {v} run beneath the {e}. |
  The {e} links the two banks of the {v}. | What river is the {e} built over? |
  Which river runs beneath the {e}? | The {e} goes over which river?

length: bridge -> number
train: The {e} is {v} metres long. | The {e} has a length of {v} metres. | The {e} measures {v} metres. |
  From end to end the {e} is {v} metres. | It is {v} metres from one end of the {e} to the other. |
  How long is the {e}? | What is the length of the {e}? | How many metres long is the {e}? |
  What does the {e} measure? | How many metres is the {e} from end to end? | The {e} is how many metres long?
validation: The {e} stretches for {v} metres. | Walkers on the {e} cover {v} metres. |
  For how many metres does the {e} stretch? | What distance do walkers on the {e} cover?
evaluation: The {e} extends over {v} metres. | The total length of the {e} is {v} metres. |
  The {e} reaches {v} metres from bank to bank. | How many metres does the {e} extend? |
  What is the total length of the {e} in metres? | How far does the {e} reach?

material: bridge -> material
train: The {e} is made of {v}. | The {e} was built from {v}. | The builders of the {e} used {v}. |
  The arches of the {e} are of {v}. | The material of the {e} is {v}. | What is the {e} made of? |
  What was the {e} built from? | Which material was used for the {e}? |
  What are the arches of the {e} made of? | What did the builders of the {e} use?
validation: The {e} rests on pillars of {v}. | Workers put up the {e} in {v}. |
  On what kind of pillars does the {e} rest? | In what material was the {e} put up?
evaluation: The {e} consists of {v}. | The {e} was constructed using {v}. |
  For the {e} the engineers chose {v}. | What material is the {e} constructed of? |
  What does the {e} consist of? | Which building material did the engineers choose for the {e}?

designer: bridge -> person
train: The {e} was designed by {v}. | {v} designed the {e}. | {v} drew the plans for the {e}. |
  The architect of the {e} was {v}. | The plans of the {e} are by {v}. | Who designed the {e}? |
  Who was the architect of the {e}? | Who drew the plans for the {e}? | By whom was the {e} designed? |
  Which architect planned the {e}?
validation: {v} won the contest to build the {e}. | The {e} goes back to a sketch by {v}. |
  Who won the contest to build the {e}? | Who made the sketch of the {e}?
evaluation: The design of the {e} is the work of {v}. | {v} conceived the {e}. |
  {v} was the engineer behind the {e}. | Who is responsible for the design of the {e}? |
  Who was the designer of the {e}? | Which engineer conceived the {e}?

inventor: machine -> person
train: The {e} was invented by {v}. | {v} invented the {e}. | {v} is the inventor of the {e}. |
  The patent for the {e} belongs to {v}. | It was {v} who came up with the {e}. | Who invented the {e}? |
  Who is the inventor of the {e}? | By whom was the {e} invented? | Who came up with the {e}? |
  To whom does the patent for the {e} belong?
validation: {v} built the first {e}. | The idea of the {e} came from {v}. | Who built the first {e}? |
  From whom did the idea of the {e} come?
evaluation: {v} devised the {e}. | The {e} is an invention of {v}. | {v} developed the {e} in a shed. |
  Who devised the {e}? | Who developed the {e}? | Whose invention is the {e}?

price: machine -> number
train: The {e} costs {v} crowns. | The price of the {e} is {v} crowns. | The {e} sells for {v} crowns. |
  One pays {v} crowns for the {e}. | The {e} can be bought for {v} crowns. | How much does the {e} cost? |
  What is the price of the {e}? | For how many crowns does the {e} sell? |
  How many crowns does one pay for the {e}? | What does the {e} cost? | How much money is asked for the {e}?
validation: Dealers ask {v} crowns for the {e}. | Buyers part with {v} crowns to own the {e}. |
  How much do dealers ask for the {e}? | What do buyers pay for the {e}?
evaluation: The {e} is on offer at {v} crowns. | The {e} is priced at {v} crowns. |
  Shops charge {v} crowns for the {e}. | How many crowns is the {e}? | How expensive is the {e}? |
  How much money do shops charge for the {e}?

weight: machine -> number
train: The {e} weighs {v} kilograms. | The weight of the {e} is {v} kilograms. |
  The {e} has a weight of {v} kilograms. | On the scales the {e} shows {v} kilograms. |
  It takes a crane to lift the {v} kilograms of the {e}. | How much does the {e} weigh? |
  What is the weight of the {e}? | How heavy is the {e}? | How many kilograms does the {e} weigh? |
  How many kilograms does the {e} show on the scales?
validation: The {e} brings {v} kilograms to the scales. | Carriers of the {e} must manage {v} kilograms. |
  How many kilograms must carriers of the {e} manage? | What weight does the {e} bring to the scales?
evaluation: The {e} has a mass of {v} kilograms. | The {e} is {v} kilograms heavy. |
  Fully assembled the {e} comes to {v} kilograms. | What is the mass of the {e}? |
  How many kilograms is the {e}? | What does the {e} weigh?

fuel: machine -> fuel
train: The {e} runs on {v}. | The {e} is powered by {v}. | The {e} burns {v}. | The {e} needs {v} to work. |
  The fuel of the {e} is {v}. | What does the {e} run on? | What is the {e} powered by? |
  What does the {e} burn? | Which fuel does the {e} need? | What is the fuel of the {e}?
validation: Workers feed the {e} with {v}. | The {e} gets its power from {v}. |
  With what do workers feed the {e}? | From what does the {e} get its power?
evaluation: The {e} uses {v} as its fuel. | The {e} is driven by {v}. |
  To start the {e} one fills it with {v}. | Which fuel drives the {e}? | What fuel does the {e} use? |
  What is needed to power the {e}?
"""

RELATIONS = parse(TABLE)
