-- Forget a replica that fell silent. A registered one is left alone: its next echo would register it again.
--
-- KEYS  presence and registry, as in echo.lua
-- ARGV  replica
--
-- Returns 1 if it was silent and is forgotten, 0 if it is registered, -1 if it is not known.

local function has(members)
  for _, member in ipairs(members) do
    if member == ARGV[1] then
      return true
    end
  end
  return false
end

local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
if has(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)) then
  redis.call('ZREM', KEYS[2], ARGV[1])
  redis.call('DEL', KEYS[1])
  return 1
end
return has(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. now, '+inf')) and 0 or -1
