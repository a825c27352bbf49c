"""Words for keys and values: 64 adjectives and 64 nouns, so 4,096 pairs."""

_ADJECTIVES = """
amber brave brisk broad calm candid clever cosy crisp curious dapper deep dusty eager early faint fancy fond frosty
gentle giant glad golden grand green happy hasty hollow honest humble icy jolly keen kind large late lively lone loyal
lucky mellow merry mighty modest narrow neat noble odd pale patient plain proud quick quiet rapid rare round rusty shy
silent silver slow small soft
"""
_NOUNS = """
acorn anchor apple arrow badge banner barrel basket beacon bell boat bottle branch bridge brook bucket candle canyon
castle cloud comet copper coral cradle desert drum eagle ember falcon feather fern field forest garden glacier hammer
harbour hill island kettle ladder lantern lemon maple marble meadow mirror mountain needle orchard otter pebble pepper
pillow pond raven ribbon river saddle sparrow spoon tower valley walnut
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
