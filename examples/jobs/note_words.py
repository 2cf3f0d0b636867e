"""The words and sentence templates of `note_to_json`; data only.

A template holds three to five of the slots {name} {quantity} {item} {price} {date}, once each, and may hold alternatives as
"(bought|ordered)". `TEST_TEMPLATES` never occur in training; they are new orders and wordings over mostly the same small words.
"""

NAMES = tuple(
    """
    Adam Aisha Alan Albert Alice Alma Amara Amir Amy Andrea Angela Anita Anna Anton Arthur Astrid Ava Barbara Beatrice Ben Bella Bianca
    Boris Brian Bruno Carla Carlos Carmen Caroline Cecilia Chiara Chloe Clara Claire Colin Conrad Cora Daisy Daniel Daria David Deborah
    Dennis Diana Diego Dora Doris Edgar Edith Edwin Elena Eli Elias Elisa Ella Ellen Elsa Emil Emily Emma Enzo Eric Erika Esther Eva Fabian
    Farah Fatima Felix Fiona Flora Frank Frida Gabriel George Gina Gloria Grace Greta Gustav Hana Hannah Harold Hassan Hazel Heidi Helen
    Henry Hugo Ian Ibrahim Ida Igor Ines Ingrid Irene Iris Isaac Isabel Ivan Ivy Jack Jacob James Jana Jane Jasmin Javier Joan Jonas Jorge
    Joseph Judith Julia Julian Kamal Karen Karl Kate Keiko Kenji Kevin Kira Klaus Lara Laura Lea Leila Lena Leo Leon Liam Lily Linda Lisa
    Louis Lucas Lucy Luis Luna Lydia Magda Malik Marco Margaret Maria Marie Mario Marta Martin Mateo Max Maya Megan Mia Michael Mila Milo
    Miriam Mona Nadia Naomi Nina Noah Nora Olga Oliver Olivia Omar Oscar Otto Paul Paula Pedro Peter Petra Philip Priya Quinn Rachel Ralph
    Raj Ravi Rebecca Rita Robert Rosa Ruben Ruth Sam Samira Sandra Sara Sergio Simon Sofia Stella Stefan Susan Tara Teresa Theo Thomas Tina
    Tobias Tom Ulla Uma Valerie Vera Victor Viola Walter Wanda Wendy William Yara Yuki Yusuf Zara Zoe
    """.split()
)

ITEMS = tuple(
    """
    apples apricots bags baskets batteries belts bells benches bikes blankets boards bolts books boots bottles bowls boxes brooms brushes
    buckets bulbs buttons cables cakes cameras candles cans caps cards chairs chargers cherries clips clocks cloths coats coins combs crates
    cups curtains cushions desks dishes dolls doors drills drums envelopes erasers fans filters flags flowers folders forks frames funnels
    gloves glasses guitars hammers hats helmets hooks hoses jackets jars jugs kettles keys kites knives labels ladders lamps lemons locks
    magnets mangoes maps markers mats melons mirrors mops mugs nails napkins needles nets notebooks oranges ovens paddles pans peaches pears
    pedals pencils pens phones pillows pipes plates plums posters pots pumps puzzles racks radios ribbons rings ropes rugs rulers saws scarves
    scissors screens screws shelves shirts shoes shovels socks spoons stamps stools sweaters tables tapes tents tiles tools towels toys trays
    tubes vases wallets watches wheels whistles windows
    """.split()
)

MODIFIERS = tuple(
    """
    black blue brown green grey orange pink purple red white yellow golden silver big small large tiny short tall thin thick round square flat
    soft hard heavy light old new used spare plain fancy cheap wooden steel glass paper plastic cotton leather copper garden kitchen office
    school travel winter summer striped folding
    """.split()
)

TRAIN_TEMPLATES = (
    # all five
    "{name} (bought|ordered|sold) {quantity} {item} for {price} on {date}.",
    "On {date} {name} (bought|ordered|sold) {quantity} {item} for {price}.",
    "On {date}, {name} (got|took) {quantity} {item} at {price}.",
    "{quantity} {item} for {name}, {price}, due {date}.",
    "{name}: {quantity} {item}, {price}, {date}.",
    "{date}: {name}, {quantity} {item}, {price}.",
    "{date}: {quantity} {item} for {name} at {price}.",
    "Order from {name}: {quantity} {item} at {price}, {date}.",
    "{name} paid {price} for {quantity} {item} on {date}.",
    "On {date} {name} paid {price} for {quantity} {item}.",
    "(Please send|Send|Ship) {quantity} {item} to {name} by {date}, price {price}.",
    "{price} for {quantity} {item}, sold to {name} on {date}.",
    "{price} from {name} on {date} for {quantity} {item}.",
    "(Delivered|Shipped) to {name} on {date}: {quantity} {item}, {price}.",
    "{name} needs {quantity} {item} by {date} and pays {price}.",
    "By {date} {name} needs {quantity} {item}, price {price}.",
    "{quantity} {item}, {price}, ordered by {name} on {date}.",
    "Price {price}, {quantity} {item}, {name}, {date}.",
    "For {name}: {quantity} {item} at {price}, due {date}.",
    "{quantity} {item} went to {name} for {price} on {date}.",
    "Due {date}: {quantity} {item}, {price}, for {name}.",
    "{item}, {quantity} pieces, {price}, for {name}, {date}.",
    "{name} asked for {quantity} {item} on {date}, price {price}.",
    # without a name
    "{quantity} {item} for {price}, due {date}.",
    "(Bought|Ordered|Sold) {quantity} {item} for {price} on {date}.",
    "On {date} we (bought|sold) {quantity} {item} at {price}.",
    "{date}: {quantity} {item}, {price}.",
    "We paid {price} for {quantity} {item} on {date}.",
    "{quantity} {item}, price {price}, arrive on {date}.",
    "{price} on {date} for {quantity} {item}.",
    # without a quantity
    "{name} (bought|ordered|sold) {item} for {price} on {date}.",
    "On {date} {name} paid {price} for {item}.",
    "{item} for {name}, {price}, due {date}.",
    "{date}: {name}, {item}, {price}.",
    "(Send|Ship) {item} to {name} by {date}, price {price}.",
    "{price} from {name} for {item} on {date}.",
    # without an item
    "{name} bought {quantity} for {price} on {date}.",
    "{date}: {quantity} for {name} at {price}.",
    "On {date} {name} paid {price} for {quantity} pieces.",
    "{name} ordered {quantity} pieces at {price}, due {date}.",
    # without a price
    "{name} (bought|ordered|returned) {quantity} {item} on {date}.",
    "On {date} {name} (bought|ordered|returned) {quantity} {item}.",
    "(Please send|Send|Ship) {quantity} {item} to {name} by {date}.",
    "{name} needs {quantity} {item} by {date}.",
    "{quantity} {item} for {name}, due {date}.",
    "{date}: {quantity} {item} went to {name}.",
    "By {date}, {name} wants {quantity} {item}.",
    # without a date
    "{name} (bought|ordered|sold) {quantity} {item} for {price}.",
    "{name} paid {price} for {quantity} {item}.",
    "{quantity} {item} for {name} at {price}.",
    "{name}: {quantity} {item}, {price}.",
    "{price} from {name} for {quantity} {item}.",
    "(Send|Ship) {quantity} {item} to {name}, price {price}.",
    "{quantity} {item} at {price}, ordered by {name}.",
    # three slots
    "{name} (bought|wants|needs) {quantity} {item}.",
    "(Send|Ship) {quantity} {item} to {name}.",
    "{quantity} {item} for {name}.",
    "{name} (bought|sold) {item} for {price}.",
    "{name} paid {price} for {item}.",
    "{name} (ordered|returned) {item} on {date}.",
    "On {date} {name} (wants|returned) {item}.",
    "{item} for {name}, due {date}.",
    "{name} paid {price} on {date}.",
    "On {date}, {name} paid {price}.",
    "{price} from {name} on {date}.",
    "{quantity} {item} at {price}.",
    "We sold {quantity} {item} for {price}.",
    "{quantity} {item} by {date}.",
    "{date}: {quantity} {item}.",
    "We need {quantity} {item} on {date}.",
    "{item} for {price}, due {date}.",
    "{date}: {item}, {price}.",
    "{name} wants {quantity} by {date}.",
    "{quantity} pieces for {name} at {price}.",
)

TEST_TEMPLATES = (
    "By {date} {name} wants {quantity} {item} for {price}.",
    "{name}, {date}: {quantity} {item} at {price}.",
    "{quantity} {item} sold to {name} at {price} on {date}.",
    "Due {date} for {name}: {quantity} {item}, price {price}.",
    "{price} paid by {name} on {date} for {quantity} {item}.",
    "For {price}, {name} ordered {quantity} {item} on {date}.",
    "On {date} we sold {quantity} {item} to {name} for {price}.",
    "By {date} we need {quantity} {item}, price {price}.",
    "{item}, {quantity} pieces, due {date}.",
    "{name} took {item} on {date} for {price}.",
    "On {date}, {name} asked for {quantity} {item}.",
    "Order from {name}: {quantity} {item}, due {date}.",
    "Sold to {name}: {quantity} {item} for {price}.",
    "For {name}: {item}, {price}.",
    "Ship {item} to {name} on {date}.",
    "{quantity} {item} went to {name}.",
)

__all__ = ["ITEMS", "MODIFIERS", "NAMES", "TEST_TEMPLATES", "TRAIN_TEMPLATES"]
