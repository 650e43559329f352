"""Write data/sample: small files in the course's formats, for a first run and for the tests.

    python data/make_sample.py              # the committed files, byte for byte
    python data/make_sample.py --out DIR    # elsewhere, to compare

All text is made here from templates; nothing is taken from the course's files. Each task keeps
what makes the real one hard: sentiment by intensifiers, negation and mixed clauses; paraphrases
by rewording against near misses that share most words; similarity by how much of an event two
sentences share. Some sentiment grades are moved to a neighbour, as raters disagree.

Most of this file is vocabulary, so it is longer than the others.
"""

import argparse
import csv
import random
import re
import sys
from pathlib import Path

SEED = 2718
SIZES = {  # examples per split: train, dev, test
    "sst": (520, 160, 120),
    "quora": (440, 150, 110),
    "sts": (440, 150, 110),
    "cfimdb": (80, 40, 40),
}
SPLITS = ("train", "dev", "test-student")

# ----------------------------------------------------------------------------------------------
# Templates: {slot} is replaced by one of the slot's choices, again and again


def choices(text: str) -> list[str]:
    """Alternatives written with bars between them; line breaks count as spaces."""
    return [" ".join(part.split()) for part in text.split("|")]


def expand(template: str, slots: dict[str, list[str]], rng: random.Random) -> str:
    """Fill the slots from the left, each with a choice that the sentence does not hold yet."""
    used = set()
    while match := re.search(r"\{(\w+)\}", template):
        choice = rng.choice([c for c in slots[match.group(1)] if c not in used])
        used.add(choice)
        template = template[: match.start()] + choice + template[match.end() :]
    return template


def with_articles(text: str) -> str:
    """Turn `a` into `an` where a vowel sound follows."""
    vowel = r"(?!one\b|once\b|eu|usu|uni[^mn])(?=[aeioué]|hono|hones|hour)"
    return re.sub(rf"\b([Aa]) {vowel}", r"\1n ", text)


def capitalised(text: str) -> str:
    """The text with its first letter large."""
    return text[:1].upper() + text[1:]


# ----------------------------------------------------------------------------------------------
# Sentiment: one sentence of a film review, grades 0 (worst) to 4 (best)

FILM_SLOTS = {
    name: choices(text)
    for name, text in {
        "superb": """superb|dazzling|exhilarating|masterful|stunning|unforgettable|exquisite|
            riveting|glorious|magnificent|breathtaking|triumphant|luminous|extraordinary|flawless|
            sublime|brilliant|spellbinding|astonishing|radiant|marvelous|electrifying|ravishing""",
        "good": """pleasant|likable|solid|engaging|enjoyable|charming|sweet|decent|watchable|
            agreeable|warm|amusing|good-natured|breezy|sturdy|diverting|thoughtful|tender|competent|
            respectable|appealing|cheerful|nimble|touching|clever|lively|graceful""",
        "weak": """thin|uneven|predictable|sluggish|forgettable|bland|slight|overlong|tired|
            routine|lukewarm|clumsy|muddled|tame|flat|underwritten|stale|scattershot|strained|
            dreary|wobbly|hollow|plodding|derivative|shapeless|mechanical""",
        "awful": """atrocious|unwatchable|dreadful|excruciating|abysmal|appalling|witless|
            incoherent|insufferable|lifeless|horrid|dismal|wretched|miserable|painful|shoddy|
            disastrous|mind-numbing|hideous|unbearable|charmless|ghastly""",
        "part": """acting|plot|screenplay|dialogue|pacing|score|photography|ending|humor|editing|
            love story|direction|opening|staging|set design|narration|final act|music|premise|
            casting""",
        "film": """film|movie|picture|comedy|drama|thriller|documentary|romance|fable|caper|
            biopic|mystery|western|musical|debut|sequel|road movie|heist picture|
            coming-of-age tale""",
        "kind": "film|movie|picture|piece of work|effort|production",
        "films": "films|movies|comedies|dramas|thrillers|romances|mysteries|musicals|debuts",
        "very": "truly|utterly|thoroughly|wonderfully|absolutely|consistently|irresistibly",
        "badly": "hopelessly|relentlessly|painfully|insultingly|terminally|crushingly",
        "bit": "mildly|fairly|reasonably|modestly|quietly|mostly|often|rather",
        "director": """Marta Lindqvist|Tomás Okafor|Ines Valcourt|Piet Zandberg|Renée Aldous|
            Kofi Marchetti|Zoë Harrow|Jun Castellan|Björn Vasquez|Amara Whitlock|Lucía Ferreday""",
        "actor": """Dalia Renner|Oskar Bellweather|Mirela Stone|Theo Abernathy-Cruz|Noémie Park|
            Gideon Lark|Priya Solberg|Hal Montserrat|Wen Alcott|Sofía Drummond""",
        "title": """The Glass Orchard|Northern Ferry|A Clock for Ada|Salt and Cinders|Café Minuit|
            Paper Lanterns|The Ninth Tenant|Harbor Lights|The Cartographer 's Son|Quiet Engines|
            El Último Tranvía|Marigold Street|The Winter Accordion""",
        "hero": """a retired lighthouse keeper|two estranged sisters|a shy violin teacher|
            a small-town baker|three stranded cyclists|an aging chess champion|a night-shift nurse|
            a failed magician|a family of beekeepers|a young translator|a stubborn mapmaker""",
        "deed": """rebuild an old ferry|settle a forgotten debt|reach the coast before winter|
            save a village cinema|find the author of a letter|win a regional bake-off|
            cross the mountains on foot|restore a ruined garden|care for an unexpected guest""",
        "place": """a fishing village|wartime Kraków|a mining town|an old quarter of Lisbon|
            an Arctic research station|a seaside hotel|a crowded night train|1970s São Paulo|
            a mountain monastery|a school in the suburbs""",
        "viewer": "anyone|you|even the most patient viewer|the audience|children|a grown-up crowd",
    }.items()
}
FILM_SLOTS["who"] = ["{director}", "{actor}", "{actor}", "{title}"]
FILM_SLOTS["it"] = ["this {film}", "{title}", "the {film}", "it", "{director} 's {film}"]

SENTIMENT = {
    4: """{it} is {very} {good} from first frame to last .|
        a {superb} {film} : the {part} is {superb} , the {part} {superb} .|
        {director} has made a {superb} , {superb} {film} .|
        {actor} is {superb} , and the {part} is never less than {superb} .|
        there is not a single {weak} moment in {it} .|
        one of the year 's most {superb} {films} , {very} {good} and {very} {superb} .|
        far from being {weak} , {it} turns out to be {superb} .|
        {it} could hardly be more {good} , and {actor} has never been better .|
        rarely has the {part} of a {kind} been so {superb} .|
        i expected something {weak} and got something {superb} .|
        how {superb} the {part} , how {superb} the whole {kind} !|
        {it} leaves {viewer} grinning , moved and {very} grateful .|
        see it twice : {it} is that {superb} .""",
    3: """{it} is a {good} and {bit} {good} {kind} .|
        a {bit} {good} {film} whose {part} is {good} .|
        {it} may be {weak} in places , but it is {very} {good} at heart .|
        not exactly {superb} , but {good} enough to recommend .|
        {actor} gives a {good} performance in a {bit} {good} {film} .|
        despite a {weak} {part} , {it} remains {good} and {good} .|
        {it} is never {weak} , and the {part} is {good} .|
        {director} keeps the {part} {good} and the {part} {good} .|
        the {part} is anything but {weak} , and {actor} is {good} .|
        if the {part} is a little {weak} , the {part} is {good} enough to make up for it .|
        {viewer} will find something {good} in {it} .|
        it takes a while to get going , but the {part} grows {bit} {good} .|
        you could do far worse than {it} , a {good} little {kind} .""",
    2: """the {part} is {superb} , but the {part} is {badly} {weak} .|
        for every {good} scene in {it} there is a {weak} one .|
        {it} is neither {superb} nor {awful} .|
        {it} follows {hero} who must {deed} .|
        set in {place} , {it} tells of {hero} trying to {deed} .|
        the {part} is {good} ; the {part} is {weak} .|
        {actor} is {superb} in a {film} that is otherwise {awful} .|
        as a {kind} about {hero} , {it} is what {viewer} would expect .|
        brilliantly acted but {badly} {weak} , {it} is hard to call .|
        {director} 's second {film} was shot in {place} with {actor} in the leading part .|
        half of {it} is {good} , half of it {weak} .|
        whether the {part} seems {good} or {weak} will depend on {viewer} .|
        {it} runs for two hours and ends where it began , in {place} .""",
    1: """{it} is a {weak} and {bit} {weak} {kind} .|
        a {weak} {film} whose {part} is {bit} {weak} .|
        {it} is {good} in places , but too {weak} to recommend .|
        not exactly {awful} , but {weak} all the same .|
        {it} is hardly {good} , and the {part} is {weak} .|
        despite the {good} {part} , {it} stays {weak} and {weak} .|
        {actor} deserves better than this {weak} {film} .|
        the {part} is anything but {good} , and {actor} seems lost .|
        if only the {part} were as {good} as the {part} ; instead it is {weak} .|
        {it} wants to be {superb} and ends up {bit} {weak} .|
        {viewer} may doze off before the {weak} {part} .|
        never as {good} as it thinks it is , {it} grows {weak} .|
        you could do far better than {it} , a {weak} little {kind} .""",
    0: """{it} is {badly} {weak} from first frame to last .|
        a {awful} {film} : the {part} is {awful} , the {part} {awful} .|
        {director} has made a {awful} , {awful} {film} .|
        {actor} is {awful} , and the {part} is never better than {awful} .|
        there is not a single {good} moment in {it} .|
        one of the year 's most {awful} {films} , {badly} {weak} and {awful} .|
        far from being {good} , {it} turns out to be {awful} .|
        {it} could hardly be more {weak} , and {actor} has never been worse .|
        rarely has the {part} of a {kind} been so {awful} .|
        i expected something {superb} and got something {awful} .|
        how {awful} the {part} , how {awful} the whole {kind} !|
        {it} leaves {viewer} bored , cheated and {badly} tired .|
        do n't see it even once : {it} is that {awful} .""",
}
SENTIMENT_WEIGHTS = {0: 13, 1: 26, 2: 19, 3: 27, 4: 15}  # per cent, about those of the treebank
MOVED_TO_NEIGHBOUR = 0.08
ASIDES = choices("""in the end , |to be fair , |as it happens , |like so many others , |
    frankly , |on second viewing , |a confession : |for the record , |somehow , |
    make no mistake : |`` {title} '' aside , |after a slow start , |at 90 minutes , """)


def review_sentence(grade: int, rng: random.Random) -> str:
    """One sentence of the given grade, spaced between tokens as the treebank is."""
    text = rng.choice(choices(SENTIMENT[grade]))
    if rng.random() < 0.3:
        text = rng.choice(ASIDES).strip() + " " + text
    return capitalised(with_articles(expand(text, FILM_SLOTS, rng)))


def sentiment_example(rng: random.Random) -> list[str]:
    """Sentence and grade; the leading space is the course's."""
    weights = SENTIMENT_WEIGHTS
    grade = rng.choices(list(weights), weights=list(weights.values()))[0]
    sentence = " " + review_sentence(grade, rng)
    if rng.random() < MOVED_TO_NEIGHBOUR:
        grade = min(4, max(0, grade + rng.choice((-1, 1))))
    return [sentence, str(grade)]


# ----------------------------------------------------------------------------------------------
# Long reviews, 0 or 1: mostly one opinion, with concessions, and a plot in between

REVIEW_FACTS = choices("""the story follows {hero} who must {deed} .|
    most of it takes place in {place} .|{actor} plays {hero} , and {actor} a neighbor .|
    i saw it on a rainy Sunday with my sister .|it was shot in {place} over one summer .|
    the first scene shows {hero} in {place} .|then somebody has to {deed} , of course .|
    people keep comparing it to " {title} " .|{director} also wrote the screenplay .|
    there is a long sequence in {place} .|it runs for almost two hours .""")
OPENINGS = {
    "either": choices("""i saw " {title} " last week .|{actor} is why i watched this {film} .|
        " {title} " is the new {film} by {director} .|people are divided over this {film} ."""),
    1: choices("""i did not expect to like this , but i was wrong .|what a lovely surprise this
        {film} is .|i have now seen " {title} " three times .|every so often a {film} comes along
        that is simply {superb} .|my whole family enjoyed this one ."""),
    0: choices("""i really wanted to like this , but i could not .|what a letdown this {film} is .|
        i nearly walked out of " {title} " .|every so often a {film} comes along that is simply
        {awful} .|nobody in my family enjoyed this one ."""),
}
VERDICTS = {
    "either": choices("""that is all i have to say about it .|others may see it differently .|
        the credits are rolling as i write this .|so much for this year 's festival ."""),
    1: choices("""warmly recommended .|do see it if you can .|eight out of ten from me .|
        i can hardly wait to see it again .|it stayed with me for days ."""),
    0: choices("""avoid it .|do something else with your evening .|two out of ten from me .|
        i would not sit through it again .|i had forgotten it by the next day ."""),
}


def long_review(label: int, words: int, rng: random.Random) -> str:
    """A review of about the given number of words."""
    # Half of the openings and verdicts give nothing away.
    sentences = [rng.choice(OPENINGS[rng.choice(("either", label))])]
    facts = rng.sample(REVIEW_FACTS, len(REVIEW_FACTS))  # each at most once in a review
    opinions, concessions = ((4, 4, 3), (1, 2)) if label else ((0, 0, 1), (3, 2))
    while sum(len(sentence.split()) for sentence in sentences) < words:
        kind = rng.choices(("fact", "opinion", "concession"), weights=(28, 60, 12))[0]
        if kind == "fact" and facts:
            sentences.append(facts.pop())
        else:
            grade = rng.choice(concessions if kind == "concession" else opinions)
            sentences.append(review_sentence(grade, rng))
    sentences.append(rng.choice(VERDICTS[rng.choice(("either", label))]))
    if words > 120:
        sentences.insert(len(sentences) // 2, "<br /><br />")
    filled = (expand(sentence, FILM_SLOTS, rng) for sentence in sentences)
    return " ".join(capitalised(with_articles(sentence)) for sentence in filled)


def long_review_example(rng: random.Random) -> list[str]:
    """Review and label; one in twenty-five is longer than BERT's 512 tokens."""
    label = rng.randrange(2)
    words = rng.randint(470, 560) if rng.random() < 0.04 else rng.randint(60, 130)
    return [" " + long_review(label, words, rng), str(label)]


# ----------------------------------------------------------------------------------------------
# Question pairs: each line of INTENTS is one meaning in several wordings; lines with the same
# slots and different meanings stand in one group, and are each other's near misses

QUESTION_SLOTS = {
    name: choices(text)
    for name, text in {
        "skill": """the cello|watercolor painting|touch typing|Portuguese|chess|pottery|juggling|
            knitting|public speaking|salsa dancing|calligraphy|sourdough baking|archery|
            mental arithmetic|swimming|the ukulele|sign language|photography""",
        "time": """three months|one summer|six weeks|a year|two weekends|half a year|ten days""",
        "age": "thirty|forty|fifty|sixty|twelve|eighteen|seventy",
        "town": """Lisbon|Kraków|Málaga|Québec|Nairobi|Kyoto|São Paulo|Hobart|Tallinn|Valparaíso|
            Zürich|Bologna|Cork|Oslo""",
        "town2": """Ghent|Reykjavík|Porto|Busan|Leeds|Salzburg|Quito|Perth|Malmö|Turin|Graz""",
        "dish": """risotto|lentil soup|crème brûlée|flatbread|pumpkin pie|ramen|tomato sauce|
            rice pudding|falafel|apple strudel|paella|hummus|onion jam""",
        "device": """laptop|phone|printer|tablet|router|camera|smartwatch|headset|e-reader|
            dishwasher|coffee machine""",
        "fault": """gets too hot|will not turn on|keeps restarting|makes a strange noise|
            loses its connection|runs slowly|does not charge|shows a black screen""",
        "word": """serendipity|petrichor|entropy|ephemeral|quixotic|zeitgeist|nostalgia|
            cognitive dissonance|laconic|schadenfreude|ubiquitous""",
        "plant": """basil|orchids|tomatoes|a lemon tree|ferns|lavender|chili peppers|
            an avocado|roses|mint|a bonsai""",
        "spot": "on a balcony|indoors|in winter|without much light|in sandy soil|in a small pot",
        "thing": """high tide|a rainbow|lightning|a solar eclipse|an earthquake|fog|hail|
            the aurora|a sonic boom|morning dew|an echo|a sandstorm""",
        "job": """a pharmacist|a data analyst|a park ranger|an architect|a sound engineer|
            a librarian|a pilot|a carpenter|a translator|a marine biologist|a nurse""",
        "book": """The Glass Orchard|Salt and Cinders|Quiet Engines|A Clock for Ada|Paper Lanterns|
            Northern Ferry|Marigold Street""",
        "pet": "cat|rabbit|parrot|puppy|hamster|tortoise|old dog|guinea pig",
        "habit": """hiding under the bed|chewing on cables|waking up so early|refusing to eat|
            scratching the sofa|following me around|making noise at night""",
    }.items()
}

INTENTS = [
    [
        """How can I learn {skill} in {time}?|What is the best way to learn {skill} in {time}?|
        Is there a good method for mastering {skill} in {time}?|
        What should I do to pick up {skill} in {time}?""",
        """Is it possible to teach {skill} in {time}?|Could someone teach others {skill} in {time}?|
        Can {skill} be taught in {time}?""",
        """How much does it cost to learn {skill} in {time}?|
        What would {time} of lessons in {skill} cost?|
        How expensive are {time} of {skill} classes?""",
    ],
    [
        """Is {age} too old to start {skill}?|Am I too old at {age} to take up {skill}?|
        Can I still begin with {skill} at the age of {age}?|
        Does it make sense to start {skill} when you are {age}?""",
        """Why do so many people give up {skill} at {age}?|
        What makes people quit {skill} around the age of {age}?|
        At {age}, why do many stop with {skill}?""",
    ],
    [
        """How do I get from {town} to {town2} by train?|
        What is the train route from {town} to {town2}?|
        Which trains should I take to travel to {town2} from {town}?""",
        """How do I get from {town2} to {town} by train?|
        What is the train route from {town2} to {town}?|
        Which trains should I take to travel to {town} from {town2}?""",
        """How far is {town} from {town2}?|What is the distance between {town} and {town2}?|
        How many kilometers lie between {town} and {town2}?""",
        """Which is the better place to live, {town} or {town2}?|
        Should I move to {town} or rather to {town2}?|
        Is life better in {town} or in {town2}?""",
    ],
    [
        """How do you make {dish} without a recipe?|What is an easy way to cook {dish}?|
        How can a beginner prepare {dish} at home?""",
        """How long does {dish} keep in the fridge?|For how many days can I store {dish}?|
        When does {dish} go bad if I keep it cold?""",
        """Can I freeze {dish}?|Is {dish} suitable for freezing?|
        Does {dish} survive in the freezer?""",
        """What goes well with {dish}?|Which side should I serve with {dish}?|
        What can I eat alongside {dish}?""",
    ],
    [
        """Why does my {device} keep acting up: it {fault}?|My {device} {fault}. What is the cause?|
        What is the reason that my {device} {fault}?""",
        """How do I fix a {device} that {fault}?|My {device} {fault}. How can I repair it?|
        What can I do when my {device} {fault}?""",
        """Should I replace a {device} that {fault}?|
        My {device} {fault}. Is it time to buy a new one?|
        Is it worth keeping a {device} if it {fault}?""",
    ],
    [
        """What does "{word}" mean?|What is the meaning of the word "{word}"?|
        How would you define "{word}"?|Can somebody explain what "{word}" means?""",
        """Where does the word "{word}" come from?|What is the origin of "{word}"?|
        Which language gave us the word "{word}"?""",
        """How do you pronounce "{word}"?|What is the correct way to say "{word}" aloud?|
        What is the pronunciation of "{word}"?""",
    ],
    [
        """How do I grow {plant} {spot}?|What is the best way of growing {plant} {spot}?|
        Any tips for raising {plant} {spot}?""",
        """How often should I water {plant} {spot}?|How much water is needed for {plant} {spot}?|
        What is the right amount of watering for {plant} {spot}?""",
        """Why do the leaves turn yellow on {plant} {spot}?|
        What causes yellow leaves on {plant} {spot}?|
        I keep {plant} {spot}; for what reason are the leaves yellow?""",
    ],
    [
        """What causes {thing}?|Why does {thing} happen?|How does {thing} come about?|
        What is the scientific explanation of {thing}?""",
        """Who first explained {thing}?|Which scientist was the first to understand {thing}?|
        Who discovered how {thing} works?""",
        """Where can I watch {thing} best?|What is the best place to observe {thing}?|
        Where should I go if I want to see {thing}?""",
    ],
    [
        """How do I become {job} at {age}?|What does it take to be {job} at {age}?|
        Which steps lead to working as {job} at the age of {age}?""",
        """How much does {job} earn at {age}?|What is the usual salary of {job} aged {age}?|
        What pay can {job} expect at {age}?""",
        """Should I quit my job as {job} at {age}?|Is it wise to stop working as {job} at {age}?|
        I am {job} and {age}: would it be a mistake to leave?""",
    ],
    [
        """What is the ending of the novel "{book}" about?|How does the book "{book}" end?|
        Can you explain the last chapter of "{book}"?""",
        """Is the novel "{book}" worth reading?|Would you recommend the book "{book}"?|
        Should I read "{book}"?""",
        """Who is the author of "{book}"?|Which writer wrote the book "{book}"?|
        By whom was "{book}" written?""",
    ],
    [
        """Why is my {pet} {habit}?|What makes my {pet} start {habit}?|
        For what reason would a {pet} be {habit}?""",
        """How do I stop my {pet} from {habit}?|What helps against a {pet} {habit}?|
        How can I get my {pet} to give up {habit}?""",
        """Is it normal for a {pet} to be {habit}?|Should I worry about my {pet} {habit}?|
        My {pet} is {habit}: is that a bad sign?""",
    ],
]
PARAPHRASES = 0.37  # share of duplicates, as in the course's file


def fill_question(template: str, values: dict[str, str]) -> str:
    """A question with its slots' values put in."""
    return with_articles(template.format_map(values))


def slot_values(group: list[str], rng: random.Random) -> dict[str, str]:
    """One value for every slot that a group of intents uses."""
    names = sorted(set(re.findall(r"\{(\w+)\}", " ".join(group))))
    return {name: rng.choice(QUESTION_SLOTS[name]) for name in names}


def question_pair(rng: random.Random) -> list[str]:
    """Two questions and whether they ask the same: 1.0 or 0.0."""
    group = rng.choice(INTENTS)
    intents = [choices(intent) for intent in group]
    values = slot_values(group, rng)
    mine = rng.choice(intents)
    first, other_wording = rng.sample(mine, 2)
    if rng.random() < PARAPHRASES:
        return [fill_question(first, values), fill_question(other_wording, values), "1.0"]
    kind = rng.choices(("value", "intent", "unrelated"), weights=(40, 45, 15))[0]
    if kind == "intent":  # the same things, another question about them
        other = rng.choice(rng.choice([intent for intent in intents if intent is not mine]))
        second = fill_question(other, values)
    elif kind == "value":  # the same question about another thing
        name = rng.choice(re.findall(r"\{(\w+)\}", first))
        others = [value for value in QUESTION_SLOTS[name] if value != values[name]]
        changed = values | {name: rng.choice(others)}
        second = fill_question(rng.choice((first, other_wording)), changed)
    else:
        elsewhere = rng.choice([other for other in INTENTS if other is not group])
        second = fill_question(rng.choice(choices(elsewhere[0])), slot_values(elsewhere, rng))
    return [fill_question(first, values), second, "0.0"]


# ----------------------------------------------------------------------------------------------
# Similarity: two captions or headlines of events; the score is what they have in common

# Each entry: the same thing in several wordings.
SCENES = {
    "caption": {
        "who": [
            choices("man|guy|gentleman"), choices("woman|lady"), choices("boy|little boy"),
            choices("girl|young girl"), choices("brown dog|tan dog"), choices("cat|kitten"),
            choices("group of children|bunch of kids"), choices("toddler|small child"),
            choices("street musician|busker"), choices("cyclist|person on a bike"),
            choices("old fisherman|elderly fisherman"), choices("white horse|pale horse"),
        ],
        "does": [
            choices("is running|is racing|runs"), choices("is sleeping|is taking a nap|sleeps"),
            choices("is eating lunch|is having a meal|eats"),
            choices("is jumping|is leaping|jumps"),
            choices("is looking at a bird|is watching a bird|watches a bird"),
            choices("is playing with a ball|plays with a ball"),
            choices("is sitting on a bench|is seated on a bench|sits on a bench"),
            choices("is drinking water|drinks some water"),
            choices("is waiting for a bus|waits for the bus"),
            choices("is climbing over a fence|climbs over a fence"),
        ],
        "where": [
            choices("in the park|in a park"), choices("at the beach|by the sea|on the shore"),
            choices("in the snow|on snowy ground"), choices("on a busy street|on a crowded road"),
            choices("in the kitchen|inside a kitchen"), choices("next to a river|beside a river"),
            choices("in front of a café|outside a café"), choices("in a field of grass|on a lawn"),
            choices("under a tree|beneath a tree"), choices("near a red barn|close to a red barn"),
        ],
        "when": [
            choices("at night|after dark"), choices("on a sunny day|in the sunshine"),
            choices("in the rain|while it rains"), choices("early in the morning|at dawn"),
        ],
    },
    "headline": {
        "who": [
            choices("Parliament|National assembly"), choices("City council|Town council"),
            choices("Central bank|National bank"), choices("Teachers' union|Union of teachers"),
            choices("Airline|Air carrier"), choices("Carmaker|Car manufacturer|Auto maker"),
            choices("Research team|Team of scientists"), choices("Football club|Soccer club"),
            choices("Court|Tribunal"), choices("Phone company|Mobile operator"),
        ],
        "does": [
            choices("approves new budget|passes new budget|backs fresh budget"),
            choices("delays decision|postpones decision|puts off decision"),
            choices("raises prices|increases prices|lifts prices"),
            choices("calls off talks|cancels talks"), choices("opens inquiry|launches inquiry"),
            choices("reports record profit|posts highest profit ever"),
            choices("warns of shortage|cautions about shortage"),
            choices("signs trade deal|agrees to trade deal"),
            choices("cuts 200 jobs|sheds 200 jobs|to lay off 200 workers"),
            choices("unveils solar project|presents solar project"),
        ],
        "where": [
            choices("in Lisbon|in Portugal's capital"), choices("in Nairobi|in Kenya's capital"),
            choices("in Québec|in Canadian province of Québec"), choices("in Oslo"),
            choices("in northern Chile|in Chile's north"), choices("in Kyoto"),
            choices("in southern Poland|in Poland's south"), choices("in Montevideo"),
            choices("on island of Malta|in Malta"), choices("in New Zealand"),
        ],
        "when": [
            choices("on Monday"), choices("after long debate|following lengthy debate"),
            choices("despite protests|in spite of protests"),
            choices("ahead of summit|before summit"),
            choices("for third time|a third time"),
        ],
    },
}
WEIGHTS = {"who": 1.5, "does": 2.1, "where": 0.9, "when": 0.5}  # points for a shared part, of 5
RATERS = 5


def draw_scene(domain: str, rng: random.Random) -> dict[str, list[str]]:
    """Choose each part of an event, as its list of wordings."""
    return {part: rng.choice(entries) for part, entries in SCENES[domain].items()}


def tell(domain: str, scene: dict[str, list[str]], parts: list[str], rng: random.Random) -> str:
    """One sentence that tells the given parts of an event."""
    *words, last = (rng.choice(scene[part]) for part in parts)
    if domain == "headline":
        return " ".join([*words, last])
    if len(words) > 1 and rng.random() < 0.5:  # the setting first
        text = f"{last}, a {' '.join(words)}"
    else:
        text = f"a {' '.join([*words, last])}"
    return capitalised(with_articles(text)) + "."


def rated(score: float, rng: random.Random) -> str:
    """The mean of five raters' whole points (now and then four, as in the benchmark)."""
    raters = RATERS if rng.random() < 0.9 else RATERS - 1
    points = [min(5, max(0, round(score + rng.gauss(0, 0.45)))) for _ in range(raters)]
    return str(round(sum(points) / raters, 2))


def similarity_pair(rng: random.Random) -> list[str]:
    """Two sentences and their similarity, 0.0 to 5.0."""
    domain = rng.choice(sorted(SCENES))
    scene, other = draw_scene(domain, rng), draw_scene(domain, rng)
    told = ["who", "does", "where"] + (["when"] if rng.random() < 0.5 else [])
    keep = rng.choices((1.0, 0.7, 0.45, 0.0), weights=(14, 32, 36, 18))[0]
    second = {part: scene[part] if rng.random() < keep else other[part] for part in told}
    told_second = told[:-1] if rng.random() < 0.2 else told
    shared = sum(WEIGHTS[p] for p in told_second if second[p] is scene[p])
    # A part told by one sentence only counts half against them: it is not contradicted.
    shared += sum(WEIGHTS[p] / 2 for p in told if p not in told_second)
    score = 5 * shared / sum(WEIGHTS[p] for p in told)
    sentences = [tell(domain, scene, told, rng), tell(domain, second, told_second, rng)]
    if domain == "headline" and rng.random() < 0.08:
        speaker = rng.choice(choices("mayor|minister|spokesperson"))
        sentences = [f'"{text}", says {speaker}' for text in sentences]
    return [*sentences, rated(score, rng)]


# ----------------------------------------------------------------------------------------------
# Files

TASKS = {  # file stem -> (maker of one example, columns of text and label)
    "sst": ("ids-sst", sentiment_example, ["sentence", "sentiment"]),
    "quora": ("quora", question_pair, ["sentence1", "sentence2", "is_duplicate"]),
    "sts": ("sts", similarity_pair, ["sentence1", "sentence2", "similarity"]),
    "cfimdb": ("ids-cfimdb", long_review_example, ["sentence", "sentiment"]),
}


def make_examples(make, count: int, rng: random.Random) -> list[list[str]]:
    """Distinct examples: no sentence occurs twice in a task, so none is in two splits."""
    examples, seen = [], set()
    while len(examples) < count:
        *sentences, label = make(rng)
        if len(set(sentences)) == len(sentences) and seen.isdisjoint(sentences):
            seen.update(sentences)
            examples.append([f"{rng.getrandbits(100):025x}", *sentences, label])
    return examples


def split_rows(stem: str, split: str, columns: list[str], examples, indices: list[int]):
    """The rows of one file, header first, with the course's index columns."""
    is_test = split == "test-student"
    if stem.startswith("ids-"):
        if is_test:  # the course wrote these files twice over, and the first index became data
            body = [[str(i + 1), f"{i}.0", *e[:-1]] for i, e in enumerate(examples)]
            return [["0", "", "id", *columns[:-1]], *body]
        indices = range(len(examples))
    width = -1 if is_test else None
    body = [[str(i), *e[:width]] for i, e in zip(indices, examples, strict=True)]
    return [["", "id", *columns[:width]], *body]


def write_task(out: Path, task: str, rng: random.Random) -> None:
    """Write the three files of one task."""
    stem, make, columns = TASKS[task]
    examples = make_examples(make, sum(SIZES[task]), rng)
    indices = rng.sample(range(len(examples)), len(examples))
    start = 0
    for split, size in zip(SPLITS, SIZES[task], strict=True):
        part = slice(start, start + size)
        rows = split_rows(stem, split, columns, examples[part], indices[part])
        with open(out / f"{stem}-{split}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
        start += size


def main(argv: list[str] | None = None) -> int:
    """Write all files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    default = Path(__file__).resolve().parent / "sample"
    parser.add_argument("--out", type=Path, default=default, help="folder (default: data/sample)")
    parser.add_argument("--seed", type=int, default=SEED, help="default: %(default)s")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        # A generator per task: a word added to one leaves the others' files as they are.
        write_task(args.out, task, random.Random(f"{args.seed} {task}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
