-- Forget a replica that fell silent. A registered one is left alone: its next echo would register it again. Where another
-- process may have its id, that one is forgotten: the registered one reads so from its presence, with its next echo.
--
-- KEYS  presence and registry, as in echo.lua
-- ARGV  replica
--
-- Returns 1 if it was silent and is forgotten, 2 if another process with its id is, 0 if it is registered, -1 if it is not
-- known.

local function score_in(rows)
  for n = 1, #rows, 2 do
    if rows[n] == ARGV[1] then
      return tonumber(rows[n + 1])
    end
  end
  return nil
end

local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
if score_in(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'WITHSCORES')) then
  redis.call('ZREM', KEYS[2], ARGV[1])
  redis.call('DEL', KEYS[1])
  return 1
end
local score = score_in(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. now, '+inf', 'WITHSCORES'))
if not score then
  return -1
end
local presence = redis.call('GET', KEYS[1])
if score % 0.5 ~= 0.25 or not presence then
  return 0
end
presence = presence:gsub(',"left":"[%w,]*"', ''):gsub('}$', ',"left":"all"}')
redis.call('SET', KEYS[1], presence, 'XX', 'KEEPTTL')
return 2
