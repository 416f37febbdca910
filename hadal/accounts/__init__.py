"""Who may use the service and what they used: keys, limits, ledger; knows prices, nothing of HTTP or models."""

from hadal.accounts.accounts import PRICE_LIST, Accounts, Balance
from hadal.accounts.keys import PERIODS, Key, Limits
from hadal.accounts.ledger import UsageRow
from hadal.accounts.limits import Hold, LimitReached
from hadal.accounts.tables import AccountsError, data_folder
from hadal.accounts.usage import GROUPS, Usage

__all__ = [
    "GROUPS",
    "PERIODS",
    "PRICE_LIST",
    "Accounts",
    "AccountsError",
    "Balance",
    "Hold",
    "Key",
    "LimitReached",
    "Limits",
    "Usage",
    "UsageRow",
    "data_folder",
]
