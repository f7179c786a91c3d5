"""jaxgen"""
