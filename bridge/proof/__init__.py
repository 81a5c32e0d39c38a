"""Is it the same policy?"""
